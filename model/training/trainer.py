"""Pretraining on megatron-core: one loop for a laptop's core and for torchrun (paper section 2).

Megatron's DDP, optimizer, pipeline schedules and distributed checkpoints around `model.megatron.spec`'s model. A killed
run goes on from its last resume state and gives the losses of an unbroken one: samples are addressed by number, and
model, master weights, optimizer and schedule come back bit for bit. A step waits for the device once, for its gradient
norm; batches are made ahead by a thread.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from model import checkpoint, costs
from model.config import ModelConfig, ModelError, PretrainConfig
from model.integrity import SUMS, sha256
from model.megatron.distributed import ONE_COPY, Parallelism, device, is_main_process, process_groups
from model.megatron.documents import find_documents
from model.megatron.engine_checkpoint import ResumeState, save_model
from model.megatron.fp8_statistics import observe
from model.megatron.limits import check_cuda_graph, check_micro_batch
from model.megatron.optimizer import build_optimizer, build_schedule, data_parallel, gather_weights, update
from model.megatron.precision import PrecisionName, choose_precision
from model.megatron.spec import build_model
from model.megatron.step_graph import StepGraph
from model.training import token_data
from model.training.distillation import Distiller, Lesson
from model.training.kernel_check import check_kernels
from model.training.run_log import Row, RunLog
from model.training.spike_guard import SpikeGuard

# A validation run reads at most this share of the training tokens: ten of them then cost about a tenth of training.
VALIDATION_SHARE = 1 / 50
# What may differ where a run goes on from a resume state: what changes memory, speed and warnings alone.
FREE_WHEN_RESUMED = frozenset((
    "micro_batch_size", "validation_micro_batch_size", "distributed_optimizer", "recompute", "cuda_graph",
    "checkpoint_every", "checkpoints_kept", "spike_factor", "max_skipped_steps", "fp8_statistics", "check_kernels",
))
UNIGRAM_TOKENS = 1_000_000      # of the training text, from which unigram frequencies are taken


@dataclass
class TrainingRun:
    """What a training run records; on the first process, empty on others.

    Attributes:
        training: one row a step: step, tokens, loss (nats a token), grad_norm, learning_rate, skipped (1 where the
            update was, for want of a finite loss and gradient), spike (1 where the gradient was unusually large).
        validation: one row a validation run and domain: step, tokens, domain, loss, bits_per_byte.
        fp8_statistics: one row an evaluation, linear layer and tensor (`megatron.fp8_statistics`), where asked for.
        metrics: flat figures of the whole run.
        resumed_from: step of the resume state the run went on from, else None.
    """

    training: list[Row]
    validation: list[Row]
    fp8_statistics: list[Row]
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
) -> TrainingRun:
    """Train `config` on the token files and write its weights and model.json to `out`.

    Args:
        config: the model.
        recipe: batch sizes, schedule, optimizer, evaluations.
        architecture: the model's name in its record.
        precision: `bf16` or `fp8` (`float32` for parity checks).
        seed: of the weights and of the order of the text.
        tokens: the tokens directory.
        out: where the weights go.
        scratch: keeps resume state, index caches and, to be followed, training.csv, validation.csv, with
            pretrain.fp8_statistics fp8_statistics.csv, and TensorBoard events; `resumed` appears there when a run goes
            on from a resume state.
        progress: called as progress(step, steps, loss=..., lr=..., **{"tok/s": ...}).
        parallelism: the layout over the processes torchrun started.

    Raises:
        ModelError: sizes that do not fit together, FP8 that cannot be computed here, token files that are not whole, a
            resume state of another recipe, a checkpoint that could not be written, loss or gradients not finite for
            too long, or a model that learned nothing (`Trainer.check_learned`); such a one is not written.
    """
    with process_groups(parallelism):
        trainer = Trainer(config, recipe, precision, seed, tokens, scratch, parallelism)
        return trainer.train(architecture, out, progress)


class Trainer:
    """One run: model, data, optimizer, and the loop over steps. With a `lesson` it is a distillation."""

    def __init__(
        self, config: ModelConfig, recipe: PretrainConfig, precision: PrecisionName, seed: int, tokens: Path,
        scratch: Path, parallelism: Parallelism, lesson: Lesson | None = None,
    ):
        self.config, self.recipe, self.scratch, self.lesson = config, recipe, scratch, lesson
        self.precision = choose_precision(
            precision, device(), recipe.bf16_layers_at_start, recipe.bf16_layers_at_end, recipe.fp8_recipe,
            recipe.fp8_gradients,
        )
        check_micro_batch(config, self.precision, recipe.micro_batch_size)
        if recipe.cuda_graph and device().type != "cuda":
            raise ModelError("pretrain.cuda_graph: there is no GPU here.\nSet it to false, or choose a CPU profile.")
        check_cuda_graph(recipe, parallelism)
        token_data.check(tokens, config.vocab_size)
        if recipe.check_kernels and device().type == "cuda":
            check_kernels(config, parallelism.tensor, device(), recipe.reset_at_documents)
        self.model = build_model(config, self.precision, parallelism, seed, recipe.recompute,
                                 lesson.start if lesson else None).to(device())
        self.trained: Any = self.model
        if lesson and lesson.teacher:
            parent, _ = checkpoint.read_description(lesson.teacher)
            self.trained = Distiller(self.model, build_model(parent, self.precision, parallelism, seed,
                                                             start=lesson.teacher).to(device()))
        self.step_graph = StepGraph(self.model, self._whole_step) if recipe.cuda_graph else None
        self.ranks, self.rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        with self.step_graph.on_stream() if self.step_graph else nullcontext():
            self.ddp = data_parallel(recipe, self.trained, self.ranks)
        self.ddp.broadcast_params()
        self.tokens_per_step = recipe.global_batch_size * config.sequence_length
        self.steps = recipe.tokens // self.tokens_per_step
        if self.steps < 1:
            raise ModelError(
                f"pretrain.tokens ({recipe.tokens}) is less than one batch of {self.tokens_per_step}.\n"
                "Raise it, or lower pretrain.global_batch_size."
            )
        self.identity = (
            config.model_dump(mode="json") | recipe_identity(recipe)
            | {"precision": precision, "seed": seed} | token_data.text_digests(tokens)
            | {name: path and sha256(path / SUMS) for name, path in
               ({"start": lesson.start, "teacher": lesson.teacher} if lesson else {}).items()}
        )
        self.optimizer = build_optimizer(recipe, self.ddp)
        self.schedule = build_schedule(recipe, self.optimizer, self.steps)
        self.resume = ResumeState(scratch, self.model, self.optimizer, self.schedule, recipe.checkpoints_kept,
                                  in_background=device().type == "cuda")
        self.guard = SpikeGuard(recipe.spike_factor, recipe.max_skipped_steps)
        self.log = RunLog(scratch) if is_main_process() else None
        self.micro_batches, left = divmod(recipe.global_batch_size, recipe.micro_batch_size * self.ranks)
        if left:
            raise ModelError(
                f"pretrain.global_batch_size ({recipe.global_batch_size}) is not a multiple of micro_batch_size "
                f"({recipe.micro_batch_size}) x {self.ranks} data-parallel processes.\nChange one of them."
            )
        self.forward_backward = get_forward_backward_func()
        self.stages = parallelism.pipeline
        samples = self.steps * recipe.global_batch_size
        self.data = lesson.samples if lesson else token_data.TrainingData(
            tokens, config.sequence_length, samples, seed, scratch / "index")
        self.batches = token_data.Prefetcher(self._batch, self.steps)
        self.tokens, self.validation_sets = tokens, self._validation_sets(tokens)
        self.eod_id = token_data.end_of_document(tokens)

    def train(self, architecture: str, out: Path, progress: Callable[..., None]) -> TrainingRun:
        """Train to the end and write the weights and model.json to `out`, which says they are an `architecture`'s."""
        with closing(self):
            run = self.run(progress)
        save_model(out, self.model)
        if is_main_process():
            training = {"architecture": architecture, "precision": self.precision.name, "seed": self.identity["seed"],
                        "tokens": run.metrics["tokens"], "steps": run.metrics["steps"]}
            training |= {key: value for key, value in run.metrics.items() if key.startswith("validation_")}
            checkpoint.describe(out, self.config, training | token_data.digests(self.tokens))
        return run

    def run(self, progress: Callable[..., None]) -> TrainingRun:
        """Train from the latest resume state, or the start, to the end."""
        first, seconds, restored = 0, 0.0, self.resume.restore(self._check_identity)
        if restored:
            first, records, _ = restored
            seconds, untrained = records["train_seconds"], records["untrained"]
            self.guard.load_state_dict(records["guard"])
            (self.scratch / "resumed").touch()
        if self.log is not None:
            self.log.start(first, restored[2] if restored else None)
        if not restored:
            rows = self.validate(0)
            untrained = rows[-1]["loss"]
            self._record("validation", rows)
        evaluation_steps = {
            round(self.steps * part / self.recipe.evaluations) for part in range(1, self.recipe.evaluations + 1)
        }
        for step in range(first + 1, self.steps + 1):
            started = time.monotonic()
            row = self.train_step(step, observed=self.recipe.fp8_statistics and step in evaluation_steps)
            took = time.monotonic() - started
            seconds += took
            self._record("training", [row], tokens_per_second=self.tokens_per_step / took)
            progress(step, self.steps, **self._figures(row, seconds))
            if step in evaluation_steps:
                rows = self.validate(step)
                self._record("validation", rows)
            self.resume.collect(wait=False)
            if step % self.recipe.checkpoint_every == 0 and step < self.steps:
                gather_weights(self.ddp)
                self.resume.save(step, {"train_seconds": seconds, "guard": self.guard.state_dict(),
                                        "untrained": untrained, "identity": self.identity},
                                 self.log.files() if self.log else ())
        self.resume.collect(wait=True)
        if self.guard.skipped == self.steps:
            raise ModelError(f"{self.scratch / 'training.csv'}: in none of {self.steps} steps were loss and gradient "
                             "finite, so that nothing was learned.\nLower the learning rate, or train in BF16.")
        if self.guard.skipped and is_main_process():
            print(f"{self.scratch / 'training.csv'}: {self.guard.skipped} of {self.steps} updates were skipped, as "
                  "loss or gradient were not finite.", flush=True)
        if self.lesson is None:
            self.check_learned(untrained, rows[-1]["loss"])
        if self.log is None:
            return TrainingRun([], [], [], {}, first or None)
        self.log.close()
        training, validation = self.log.rows("training"), self.log.rows("validation")
        return TrainingRun(training, validation, self.log.rows("fp8_statistics"),
                   self._metrics(training, validation, seconds), first or None)

    def close(self) -> None:
        """Give back the thread that makes batches and the captured step."""
        self.batches.close()
        if self.step_graph:
            self.step_graph.close()

    def train_step(self, step: int, observed: bool = False) -> Row:
        """Forward, backward and update on batch `step` (from 1). Returns its training.csv row.

        Where it is `observed`, the step adds its rows to fp8_statistics.csv.

        Raises:
            ModelError: loss or gradients have not been finite for too many steps.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        sequences = self.batches[step]
        if observed:
            losses = self._observed_step(step, sequences)
        else:
            losses = self.step_graph(sequences) if self.step_graph else self._whole_step(sequences)
        total = self._sum_over_processes(losses)
        self.schedule.step(1)
        row: Row = {"step": step, "tokens": step * self.tokens_per_step}

        def accept(grad_norm: float) -> bool:
            loss = total.item() / self.micro_batches / self.ranks       # queued before the norm: there already
            verdict = self.guard.check(step, loss, grad_norm)
            row.update(
                loss=loss, grad_norm=grad_norm, learning_rate=self.optimizer.param_groups[0]["lr"],
                skipped=int(verdict == "skip"), spike=int(verdict == "spike"),
            )
            return verdict != "skip"

        update(self.optimizer, self.recipe.clip_grad, accept)
        return row

    def validate(self, step: int) -> list[Row]:
        """Rows of validation.csv: every domain, then `all`: losses weighted by tokens, bits by bytes."""
        gather_weights(self.ddp)
        self.ddp.eval()
        rows, nats, tokens, size = [], 0.0, 0, 0
        for domain, data in self.validation_sets.items():
            domain_nats = self._validation_nats(data.sequences)
            domain_tokens = data.sequences[:, 1:].numel()
            rows.append(self._validation_row(step, domain, domain_nats, domain_tokens, data.bytes))
            nats, tokens, size = nats + domain_nats, tokens + domain_tokens, size + data.bytes
        self.ddp.train()
        return [*rows, self._validation_row(step, "all", nats, tokens, size)]

    def _check_identity(self, records: dict[str, Any]) -> None:
        """Refuse the resume state of a run with another model, recipe, seed or text. Raises ModelError."""
        check_identity(self.scratch / "resume", records.get("identity", {}), self.identity)

    def check_learned(self, untrained: float, trained: float) -> None:
        """Refuse a run that learned nothing, by its validation losses before and after, nats a token.

        Every run must end below where it started. One of at least a token a parameter must also end below the unigram
        loss: what a model would have that knew no more than how often each token occurs. A shorter one, a trial of a
        few steps, need not.

        Raises:
            ModelError: it did not.
        """
        limit, name = untrained, "its validation loss before training"
        if self.steps * self.tokens_per_step >= costs.parameters(self.config) and self.unigram_loss < limit:
            limit, name = self.unigram_loss, "the unigram loss, of token frequencies alone"
        if not trained < limit:
            raise ModelError(
                f"{self.scratch / 'validation.csv'}: training ends at {trained:.4f} nats a token, not below {name} "
                f"({limit:.4f}): the model learned nothing.\n"
                "Look at loss and grad_norm in training.csv beside it: lower pretrain.learning_rate, or see whether "
                "BF16 learns, and on a GPU whether `pytest -m gpu` passes."
            )

    @cached_property
    def unigram_loss(self) -> float:
        """Cross entropy, nats a token, of the predicted validation tokens under the token frequencies of training text.

        Frequencies are those of about UNIGRAM_TOKENS tokens, spread evenly over the run's samples, each id's count
        raised by one so that none is impossible.
        """
        wanted = min(len(self.data), -(-UNIGRAM_TOKENS // self.config.sequence_length))
        counts = torch.ones(self.config.vocab_size, dtype=torch.float64)
        for number in range(wanted):
            counts += torch.bincount(self.data[number * len(self.data) // wanted], minlength=len(counts))
        predicted = torch.cat([data.sequences[:, 1:].flatten() for data in self.validation_sets.values()])
        return -(counts / counts.sum()).log()[predicted].mean().item()

    def _record(self, name: str, rows: list[Row], **rates: float) -> None:
        """Append rows to the log and their figures, with those of `rates`, to its curves."""
        if self.log is None:
            return
        for row in rows:
            self.log.append(name, row)
            curves = {key: value for key, value in row.items() if key not in ("step", "tokens", "domain")}
            place = f"{name}/{row['domain']}" if "domain" in row else name
            self.log.plot(row["step"], {f"{place}/{key}": value for key, value in (curves | rates).items()})

    def _figures(self, row: Row, seconds: float) -> dict[str, float]:
        """What the progress line shows after `row`; counts of what went wrong only where something did."""
        figures = {"loss": row["loss"], "lr": row["learning_rate"], "tok/s": row["tokens"] / seconds}
        if self.guard.skipped:
            figures["skipped"] = self.guard.skipped
        if self.guard.spikes:
            figures["spikes"] = self.guard.spikes
        return figures

    def _validation_row(self, step: int, domain: str, nats: float, tokens: int, size: int) -> Row:
        return {"step": step, "tokens": step * self.tokens_per_step, "domain": domain, "loss": nats / tokens,
                "bits_per_byte": nats / math.log(2) / size}

    @torch.no_grad()
    def _validation_nats(self, sequences: Tensor) -> float:
        """Summed loss over `sequences`, shared among the data-parallel processes in micro-batches of one size."""
        most = (self.recipe.validation_micro_batch_size or self.recipe.micro_batch_size) * self.ranks
        batches = -(-len(sequences) // most)
        size = -(-len(sequences) // (batches * self.ranks))         # as even as they come: the least padding
        padding = batches * size * self.ranks - len(sequences)
        counted = torch.ones(len(sequences) + padding)
        counted[len(sequences):] = 0.0
        padded = torch.cat([sequences, sequences[:1].expand(padding, -1)])
        mine = list(zip(padded.split(size), counted.split(size), strict=True))[self.rank::self.ranks]
        return self._sum_over_processes(self._forward_backward(iter(mine), len(mine), size, forward_only=True)).item()

    def _whole_step(self, sequences: Tensor) -> list[Tensor]:
        """Forward and backward of sequences (micro-batches, micro-batch size, sequence + 1)."""
        batches = ((micro_batch, None) for micro_batch in sequences)
        return self._forward_backward(batches, self.micro_batches, self.recipe.micro_batch_size, forward_only=False)

    def _observed_step(self, step: int, sequences: Tensor) -> list[Tensor]:
        """The same with what FP8 does to its first micro-batch recorded; never as a CUDA graph."""
        stream = self.step_graph.on_stream() if self.step_graph else nullcontext()
        with observe(self.model.decoder.layers, self.config.pattern, self.precision) as rows, stream:
            losses = self._whole_step(sequences)
        if self.log is not None:
            for row in rows:
                self.log.append("fp8_statistics", {"step": step} | row)
        return losses

    def _forward_backward(self, batches: Iterator[Any], count: int, size: int, forward_only: bool) -> list[Tensor]:
        """Losses of `count` micro-batches of `size` sequences on the pipeline's last stage, elsewhere nothing."""
        pairs = isinstance(self.trained, Distiller) and not forward_only
        results = self.forward_backward(
            forward_step_func=self._forward_step, data_iterator=batches, model=[self.ddp], num_microbatches=count,
            seq_length=self.config.sequence_length, micro_batch_size=size, forward_only=forward_only,
            adjust_tensor_shapes_fn=self.trained.shapes if pairs and self.stages > 1 else None,
        )
        return [result["loss"] for result in results]

    def _forward_step(self, batches: Iterator[tuple[Tensor, Tensor | None]], model: Any) -> tuple[Tensor, Any]:
        """Megatron's hook: the model's output on the next micro-batch, and how to reduce it to a loss."""
        sequences, counted = next(batches)
        sequences = sequences.to(device(), non_blocking=True)
        input_ids, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        documents = find_documents(input_ids, self.eod_id) if self.recipe.reset_at_documents else None
        output = model(input_ids, None, None, labels=labels, packed_seq_params=documents)
        return output, partial(_loss, counted)

    def _batch(self, step: int) -> Tensor:
        """This process's micro-batches of batch `step`, (micro-batches, micro-batch size, sequence + 1), where the
        device can copy from while it computes."""
        size = self.recipe.micro_batch_size
        start = (step - 1) * self.recipe.global_batch_size + self.rank * self.micro_batches * size
        samples = torch.stack([self.data[sample] for sample in range(start, start + self.micro_batches * size)])
        return (samples.pin_memory() if device().type == "cuda" else samples).unflatten(0, (-1, size))

    def _sum_over_processes(self, values: list[Tensor]) -> Tensor:
        """The sum over micro-batches and data-parallel processes; the last pipeline stage has them, all get to know."""
        total = torch.stack(values).sum() if values else torch.zeros((), device=device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return total

    def _validation_sets(self, tokens: Path) -> dict[str, token_data.ValidationSet]:
        """Each domain's first sequences, so many that one validation run stays within its share of training; at least
        one. Micro-batches and processes have no say in it."""
        domains = token_data.domains(tokens)
        count = max(1, int(self.recipe.tokens * VALIDATION_SHARE / len(domains) / self.config.sequence_length))
        return {
            domain: token_data.validation(tokens, domain, self.config.sequence_length).first(count)
            for domain in domains
        }

    def _metrics(self, training: list[Row], validation: list[Row], seconds: float) -> dict[str, float]:
        done = [row["loss"] for row in training if not row["skipped"]]
        tail = done[-max(1, self.steps // 20):]
        first = next(row for row in validation if row["step"] > 0 and row["domain"] == "all")
        at_end = {row["domain"]: row["bits_per_byte"] for row in validation if row["step"] == self.steps}
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        speed = self.steps * self.tokens_per_step / seconds
        metrics = {
            "parameters": costs.parameters(self.config),
            "tokens": self.steps * self.tokens_per_step,
            "steps": self.steps,
            "final_loss": sum(tail) / len(tail),                            # the last twentieth of training
            "validation_bits_per_byte": at_end.pop("all"),
            "validation_bits_per_byte_first": first["bits_per_byte"],       # the first evaluation after the start
            "validation_first_tokens": first["tokens"],
            "validation_unigram_loss": self.unigram_loss,
            "tokens_per_second": speed,
            "train_seconds": seconds,
            "peak_memory_gib": peak,
            "steps_skipped": self.guard.skipped,
            "gradient_spikes": self.guard.spikes,
        }
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        utilization = costs.flops_utilization(self.config, speed, dist.get_world_size(), name)
        if utilization is not None:
            metrics["model_flops_utilization"] = utilization
        metrics |= {f"validation_bits_per_byte_{domain}": value for domain, value in at_end.items()}
        if self.precision.emulated:
            metrics["fp8_emulated"] = 1
        return metrics


def recipe_identity(recipe: PretrainConfig) -> dict[str, Any]:
    """What of a recipe a resume state depends on. A state of a run with resets that does not say where documents begin
    may be of one in which they ended with their mark."""
    begins = {"documents begin": "with the mark"} if recipe.reset_at_documents else {}
    return recipe.model_dump(mode="json", exclude=set(FREE_WHEN_RESUMED)) | begins


def check_identity(state: Path, of_state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ModelError where what is kept in `state` is of a run that differs in what `own` says of this one."""
    if differ := [name for name, value in own.items() if of_state.get(name) != value]:
        values = ", ".join(f"{name} {of_state.get(name)} and now {own[name]}" for name in differ)
        raise ModelError(
            f"{state}: the state of another run: {values}.\n"
            "Give this run a directory of its own, or go on with the values of the state."
        )


def _loss(counted: Tensor | None, nats: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """nats (batch, sequence) -> what backward starts from and what is reported: in training the mean, in validation
    (where `counted` (batch,) marks real sequences) the sum."""
    loss = nats.mean() if counted is None else nats.sum(1) @ counted.to(nats)
    return loss, {"loss": loss.detach().clone()}        # Megatron divides `loss` in place
