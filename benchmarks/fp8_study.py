"""Number formats, for the study `fp8_parity` (`benchmarks.studies`): small models that differ in these alone.

A model trains in BF16; at half of its steps every other arm leaves it, with its weights, moments and order of the text,
and changes what ARMS says. Such pairs have far less noise than those that differ from the first step on, and test less:
what FP8 does from there on, to a model that BF16 brought there, under the decaying rate; the paper saw FP8 fall behind
in the last quarter.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from model.config import ModelConfig, ModelError, PretrainConfig
from model.megatron.distributed import ONE_COPY, process_groups
from model.presets import hybrid_pattern
from model.processes import release_memory
from model.training.trainer import Trainer

MARGIN = 0.001          # of the loss: the paper's "< 0.1 %"
TAIL = 0.2              # last share of the steps that the training loss is averaged over
ARCHITECTURES = ("transformer", "hybrid")
CONTROL = "FP8 without scales"


class Arm(NamedTuple):
    """What differs from the BF16 run."""

    precision: Literal["bf16", "fp8"]
    changes: dict[str, Any]


ARMS = {
    "BF16": Arm("bf16", {}),                # first: the others leave it
    "FP8": Arm("fp8", {}),              # the paper's recipe: current scaling, E4M3 and for gradients E5M2
    "FP8, two BF16 layers at each end": Arm("fp8", {"bf16_layers_at_start": 2, "bf16_layers_at_end": 2}),
    "FP8, no BF16 layers": Arm("fp8", {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}),
    "FP8, gradients in E4M3": Arm("fp8", {"fp8_gradients": "e4m3"}),
    CONTROL: Arm("fp8", {"fp8_recipe": "unscaled"}),                        # broken, and must be seen to be
    "BF16, weight decay 0.1 % larger": Arm("bf16", {"weight_decay": 0.1001}),   # what pairs differ by without FP8
}


class Sizes(NamedTuple):
    """Of models and their training; a step is `sequences` of `length` tokens."""

    width: int
    layers: int
    ffn: int
    mamba: tuple[int, int, int, int]        # heads, their size, state, groups
    head: int
    learning_rate: float
    sequences: int
    length: int
    steps: int


GPU = Sizes(width=256, layers=28, ffn=768, mamba=(16, 32, 32, 4), head=64, learning_rate=1e-3, sequences=64,
            length=1024, steps=300)
CPU = Sizes(width=32, layers=12, ffn=64, mamba=(16, 8, 8, 4), head=16, learning_rate=1e-2, sequences=8, length=32,
            steps=40)                       # to see whether all works: FP8 is emulated


def model_config(sizes: Sizes, architecture: str, vocab_size: int) -> ModelConfig:
    """The hybrid by the paper's rules, without positions; the Transformer in as many layers, with rotary ones."""
    heads = sizes.width // sizes.head
    mamba = dict(zip(("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"), sizes.mamba,
                     strict=True))
    hybrid = architecture == "hybrid"
    return ModelConfig(
        pattern=hybrid_pattern(sizes.layers) if hybrid else "*-" * (sizes.layers // 2), hidden_size=sizes.width,
        ffn_hidden_size=sizes.ffn, num_attention_heads=heads, num_query_groups=max(1, heads // 2),
        head_dim=sizes.head, position_embedding="none" if hybrid else "rope", sequence_length=sizes.length,
        chunk_size=min(128, sizes.length), vocab_size=vocab_size, **(mamba if hybrid else {}),
    )


def recipe(sizes: Sizes) -> PretrainConfig:
    """The paper's: cosine to 1 % after the warm-up, AdamW; a batch is one micro-batch. The state at half is kept."""
    return PretrainConfig(
        tokens=sizes.steps * sizes.sequences * sizes.length, global_batch_size=sizes.sequences,
        micro_batch_size=sizes.sequences, learning_rate=sizes.learning_rate,
        min_learning_rate=sizes.learning_rate / 100, warmup_fraction=0.05, decay_style="cosine", weight_decay=0.1,
        adam_betas=(0.9, 0.95), clip_grad=1.0, bf16_layers_at_start=4, bf16_layers_at_end=4, evaluations=1,
        checkpoint_every=(sizes.steps + 1) // 2,
    )


class ArmTrainer(Trainer):
    """Goes on from the BF16 run's state; only the control need not learn."""

    arm = ""

    def _check_identity(self, records: dict[str, Any]) -> None:
        """An arm differs from the BF16 run in what it changes, and in nothing else."""
        changed = {name: self.identity[name] for name in ("precision", *ARMS[self.arm].changes)}
        super()._check_identity({"identity": records["identity"] | changed})

    def check_learned(self, untrained: float, trained: float) -> None:
        """However few its tokens, a model must beat single tokens; but the control may do as it does."""
        if self.arm == CONTROL:
            return
        super().check_learned(untrained, trained)
        if not trained < self.unigram_loss:
            raise ModelError(f"{self.arm}: the validation loss ends at {trained:.4f} nats, not below the unigram loss "
                             f"({self.unigram_loss:.4f}): it did not learn.\n"
                             "That is no measurement: look for a fault in the kernels of its sizes.")


def losses(config: ModelConfig, common: PretrainConfig, seed: int, tokens: Path, scratch: Path) -> dict[str, float]:
    """Of every arm, nats a token: `ARM, training loss`, the mean over the last TAIL of the steps, and `ARM, validation
    loss`, after the last.

    Args:
        common: the recipe that the arms change.
        scratch: an empty directory, for states.

    Raises:
        ModelError: a run cannot be trained or did not learn (unless it is the control), or one in FP8 computed
            nothing in FP8.
    """
    found: dict[str, float] = {}
    trunk = scratch / "BF16"
    for name, arm in ARMS.items():
        own = scratch / name
        if own != trunk:
            for part in ("resume", "index"):
                shutil.copytree(trunk / part, own / part)
        changed = PretrainConfig(**common.model_dump() | arm.changes)
        with process_groups():
            trainer = ArmTrainer(config, changed, arm.precision, seed, tokens, own, ONE_COPY)
            trainer.arm = name
            with closing(trainer):
                run = trainer.run(lambda *_, **__: None)
            tail = trainer.steps - round(TAIL * trainer.steps)
            del trainer
            release_memory()
        found |= {f"{name}, training loss": fmean(row["loss"] for row in run.training if row["step"] > tail),
                  f"{name}, validation loss": [row["loss"] for row in run.validation if row["domain"] == "all"][-1]}
        if arm.precision == "fp8" and found[f"{name}, training loss"] == found["BF16, training loss"]:
            raise ModelError(f"{name}: the same loss as in BF16, to the last digit.\nNothing was computed in FP8.")
        if own != trunk:
            shutil.rmtree(own)
    return found
