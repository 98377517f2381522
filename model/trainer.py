"""Pretraining on megatron-core: one loop for a laptop's core and for torchrun (paper section 2).

Megatron's DDP, optimizer, pipeline schedules and distributed checkpoints around `model.spec`'s model. A killed run goes
on from its last resume state and gives the losses of an unbroken one: samples are addressed by number, and model,
master weights, optimizer and schedule come back bit for bit.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import te_guard  # noqa: F401    # before Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from model import checkpoint, costs, token_data
from model.config import ModelConfig, ModelError, PretrainConfig
from model.distributed import ONE_COPY, Parallelism, device, is_main_process, process_groups
from model.documents import find_documents
from model.engine_checkpoint import ResumeState, save_model
from model.limits import check_cuda_graph, check_micro_batch
from model.optimizer import build_optimizer, build_schedule
from model.precision import PrecisionName, choose_precision
from model.spec import build_model
from model.step_graph import StepGraph

# A validation run reads at most this share of the training tokens: ten of them then cost about a tenth of training.
VALIDATION_SHARE = 1 / 50


@dataclass
class Run:
    """What a training run records.

    Attributes:
        training: one row a step: step, tokens, loss (nats a token), grad_norm, learning_rate.
        validation: one row a validation run and domain: step, tokens, domain, loss, bits_per_byte.
        metrics: flat figures of the whole run.
        resumed_from: step of the resume state the run went on from, else None.
    """

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    metrics: dict[str, float]
    resumed_from: int | None


def train(
    config: ModelConfig,
    recipe: PretrainConfig,
    architecture: str,
    precision: PrecisionName,
    seed: int,
    tokens: Path,
    out: Path,
    scratch: Path,
    progress: Callable[..., None],
    parallelism: Parallelism = ONE_COPY,
) -> Run:
    """Train `config` on the token files and write its weights and model.json to `out`.

    Args:
        config: the model.
        recipe: batch sizes, schedule, optimizer, evaluations.
        architecture: the model's name in its record.
        precision: `bf16` or `fp8` (`float32` for parity checks).
        seed: of the weights and of the order of the text.
        tokens: the tokens directory.
        out: where the weights go.
        scratch: keeps resume state and index caches; `resumed` appears there when a run goes on from one.
        progress: called as progress(step, steps, loss=..., lr=..., **{"tok/s": ...}).
        parallelism: the layout over the processes torchrun started.

    Raises:
        ModelError: sizes that do not fit together, FP8 that cannot be computed here, or a loss that is not finite.
    """
    with process_groups(parallelism):
        trainer = Trainer(config, recipe, precision, seed, tokens, scratch, parallelism)
        run = trainer.run(progress)
        save_model(out, trainer.model)
        if is_main_process():
            training = {"architecture": architecture, "precision": precision, "seed": seed,
                        "tokens": run.metrics["tokens"], "steps": run.metrics["steps"]}
            training |= {key: value for key, value in run.metrics.items() if key.startswith("validation_")}
            checkpoint.describe(out, config, training | token_data.digests(tokens))
    return run


class Trainer:
    """One run: model, data, optimizer, and the loop over steps."""

    def __init__(
        self, config: ModelConfig, recipe: PretrainConfig, precision: PrecisionName, seed: int, tokens: Path,
        scratch: Path, parallelism: Parallelism,
    ):
        self.config, self.recipe, self.scratch = config, recipe, scratch
        self.precision = choose_precision(precision, device(), recipe.bf16_layers_at_start, recipe.bf16_layers_at_end)
        check_micro_batch(config, self.precision, recipe.micro_batch_size)
        check_cuda_graph(recipe, parallelism)
        self.model = build_model(config, self.precision, parallelism, seed, recipe.recompute).to(device())
        self.step_graph = StepGraph(self._whole_step) if recipe.cuda_graph else None
        with self.step_graph.on_stream() if self.step_graph else nullcontext():
            self.ddp = DistributedDataParallel(
                self.model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), self.model
            )
        self.ddp.broadcast_params()
        self.tokens_per_step = recipe.global_batch_size * config.sequence_length
        self.steps = recipe.tokens // self.tokens_per_step
        if self.steps < 1:
            raise ModelError(
                f"pretrain.tokens ({recipe.tokens}) is less than one batch of {self.tokens_per_step}.\n"
                "Raise it, or lower pretrain.global_batch_size."
            )
        self.optimizer = build_optimizer(recipe, self.ddp)
        self.schedule = build_schedule(recipe, self.optimizer, self.steps)
        self.resume = ResumeState(scratch, self.model, self.optimizer, self.schedule)
        self.ranks, self.rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        self.micro_batches, left = divmod(recipe.global_batch_size, recipe.micro_batch_size * self.ranks)
        if left:
            raise ModelError(
                f"pretrain.global_batch_size ({recipe.global_batch_size}) is not a multiple of micro_batch_size "
                f"({recipe.micro_batch_size}) x {self.ranks} data-parallel processes.\nChange one of them."
            )
        self.forward_backward = get_forward_backward_func()
        samples = self.steps * recipe.global_batch_size
        self.data = token_data.TrainingData(tokens, config.sequence_length, samples, seed, scratch / "index")
        self.validation_sets = self._validation_sets(tokens)
        self.eod_id = token_data.end_of_document(tokens)

    def run(self, progress: Callable[..., None]) -> Run:
        """Train from the latest resume state, or the start, to the end."""
        records: dict[str, Any] = {"training": [], "validation": [], "train_seconds": 0.0}
        first, restored = 0, self.resume.restore()
        if restored:
            first, records = restored
            (self.scratch / "resumed").touch()
        else:
            records["validation"] += self.validate(0)
        evaluation_steps = {
            round(self.steps * part / self.recipe.evaluations) for part in range(1, self.recipe.evaluations + 1)
        }
        for step in range(first + 1, self.steps + 1):
            started = time.monotonic()
            row = self.train_step(step)
            records["train_seconds"] += time.monotonic() - started
            records["training"].append(row)
            speed = row["tokens"] / records["train_seconds"]
            progress(step, self.steps, loss=row["loss"], lr=row["learning_rate"], **{"tok/s": speed})
            if step in evaluation_steps:
                records["validation"] += self.validate(step)
            if step % self.recipe.checkpoint_every == 0 and step < self.steps:
                self.resume.save(step, records)
        return Run(records["training"], records["validation"], self._metrics(records), first or None)

    def train_step(self, step: int) -> dict[str, Any]:
        """Forward, backward and update on batch `step` (from 1). Returns its training.csv row."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        sequences = torch.stack(list(self._batches(step)))
        losses = self.step_graph(sequences) if self.step_graph else self._whole_step(sequences)
        value = self._sum_over_processes(losses) / self.micro_batches / self.ranks
        if not math.isfinite(value):
            raise ModelError(
                f"training diverged: the loss of step {step} is {value}.\nLower pretrain.learning_rate, or raise "
                "pretrain.warmup_fraction."
            )
        self.schedule.step(1)
        _, grad_norm, _ = self.optimizer.step()
        return {
            "step": step, "tokens": step * self.tokens_per_step, "loss": value, "grad_norm": float(grad_norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def validate(self, step: int) -> list[dict[str, Any]]:
        """Rows of validation.csv: every domain, then `all`, their mean weighted by bytes."""
        self.ddp.eval()
        rows, nats, tokens, size = [], 0.0, 0, 0
        for domain, data in self.validation_sets.items():
            domain_nats = self._validation_nats(data.sequences)
            domain_tokens = data.sequences[:, 1:].numel()
            rows.append(self._validation_row(step, domain, domain_nats, domain_tokens, data.bytes))
            nats, tokens, size = nats + domain_nats, tokens + domain_tokens, size + data.bytes
        self.ddp.train()
        return [*rows, self._validation_row(step, "all", nats, tokens, size)]

    def _validation_row(self, step: int, domain: str, nats: float, tokens: int, size: int) -> dict[str, Any]:
        return {"step": step, "tokens": step * self.tokens_per_step, "domain": domain, "loss": nats / tokens,
                "bits_per_byte": nats / math.log(2) / size}

    @torch.no_grad()
    def _validation_nats(self, sequences: Tensor) -> float:
        """Summed loss over `sequences`, shared among the data-parallel processes in micro-batches of one size."""
        size = self.recipe.micro_batch_size
        padding = -len(sequences) % (size * self.ranks)
        counted = torch.ones(len(sequences) + padding)
        counted[len(sequences):] = 0.0
        padded = torch.cat([sequences, sequences[:1].expand(padding, -1)])
        mine = list(zip(padded.split(size), counted.split(size), strict=True))[self.rank::self.ranks]
        return self._sum_over_processes(self._forward_backward(iter(mine), len(mine), forward_only=True))

    def _whole_step(self, sequences: Tensor) -> list[Tensor]:
        """Forward and backward of sequences (micro-batches, micro-batch size, sequence + 1)."""
        batches = ((micro_batch, None) for micro_batch in sequences)
        return self._forward_backward(batches, self.micro_batches, forward_only=False)

    def _forward_backward(self, batches: Iterator[Any], count: int, forward_only: bool) -> list[Tensor]:
        """Run `count` micro-batches through the pipeline. Returns their losses on its last stage, else nothing."""
        results = self.forward_backward(
            forward_step_func=self._forward_step, data_iterator=batches, model=[self.ddp], num_microbatches=count,
            seq_length=self.config.sequence_length, micro_batch_size=self.recipe.micro_batch_size,
            forward_only=forward_only,
        )
        return [result["loss"] for result in results]

    def _forward_step(self, batches: Iterator[tuple[Tensor, Tensor | None]], model: Any) -> tuple[Tensor, Any]:
        """Megatron's hook: the model's output on the next micro-batch, and how to reduce it to a loss."""
        sequences, counted = next(batches)
        sequences = sequences.to(device())
        input_ids, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        documents = find_documents(input_ids, self.eod_id) if self.recipe.reset_at_documents else None
        output = model(input_ids, None, None, labels=labels, packed_seq_params=documents)
        return output, partial(_loss, counted)

    def _batches(self, step: int) -> Iterator[Tensor]:
        """This process's micro-batches of batch `step`."""
        size = self.recipe.micro_batch_size
        start = (step - 1) * self.recipe.global_batch_size + self.rank * self.micro_batches * size
        for first in range(start, start + self.micro_batches * size, size):
            yield torch.stack([self.data[sample] for sample in range(first, first + size)])

    def _sum_over_processes(self, values: list[Tensor]) -> float:
        """The sum over micro-batches and data-parallel processes; the last pipeline stage has them, all get to know."""
        total = torch.stack(values).sum() if values else torch.zeros((), device=device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return total.item()

    def _validation_sets(self, tokens: Path) -> dict[str, token_data.ValidationSet]:
        """Each domain's first sequences, so many that one validation run stays within its share of training."""
        domains = token_data.domains(tokens)
        size = self.recipe.micro_batch_size
        allowed = self.recipe.tokens * VALIDATION_SHARE / len(domains) / self.config.sequence_length
        count = math.ceil(allowed / size) * size
        return {
            domain: token_data.validation(tokens, domain, self.config.sequence_length).first(count)
            for domain in domains
        }

    def _metrics(self, records: dict[str, Any]) -> dict[str, float]:
        training, validation = records["training"], records["validation"]
        tail = training[-max(1, self.steps // 20):]
        first_tenth = min(row["step"] for row in validation if row["step"] > 0)
        at_end = {row["domain"]: row["bits_per_byte"] for row in validation if row["step"] == self.steps}
        at_first_tenth = {row["domain"]: row["bits_per_byte"] for row in validation if row["step"] == first_tenth}
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        metrics = {
            "parameters": costs.parameters(self.config),
            "tokens": self.steps * self.tokens_per_step,
            "steps": self.steps,
            "final_loss": sum(row["loss"] for row in tail) / len(tail),     # the last twentieth of training
            "validation_bits_per_byte": at_end.pop("all"),
            "validation_bits_per_byte_first_tenth": at_first_tenth["all"],
            "tokens_per_second": self.steps * self.tokens_per_step / records["train_seconds"],
            "train_seconds": records["train_seconds"],
            "peak_memory_gib": peak,
        }
        metrics |= {f"validation_bits_per_byte_{domain}": value for domain, value in at_end.items()}
        if self.precision.emulated:
            metrics["fp8_emulated"] = 1
        return metrics


def _loss(counted: Tensor | None, nats: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """nats (batch, sequence) -> what backward starts from and what is reported: in training the mean, in validation
    (where `counted` (batch,) marks real sequences) the sum."""
    loss = nats.mean() if counted is None else nats.sum(1) @ counted.to(nats)
    return loss, {"loss": loss.detach().clone()}        # Megatron divides `loss` in place
