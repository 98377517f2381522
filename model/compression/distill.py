"""Distillation: a student learns the parent's next-token distribution (paper section 3).

The loss is the forward KL divergence KL(parent || student) of the logits at temperature 1, and nothing else: no
cross-entropy, no hidden states. Students stand side by side in one run, so that all see the same tokens in the same
order and the parent's logits are computed once. Both sides run in the teacher's number format (BF16 on a GPU; on a CPU
float32, where BF16 is several times slower), over float32 master weights of the students.
Cross-entropy on the next token instead is there as a control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from kernels.cross_entropy import cross_entropy
from kernels.forward_kl import forward_kl
from model.compression.config import CompressConfig
from model.compression.prune import State
from model.compression.resume import ResultCache
from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM

# The paper's pretraining optimiser (section 2.4).
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_GRAD = 1.0
FETCH_EVERY = 10                # steps between reads of the losses, each of which waits for the device

Objective = Literal["kl", "cross_entropy"]


def learning_rate(config: CompressConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine down to the smallest rate at the last step."""
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup + 1) / (steps - warmup)
    low, high = config.min_learning_rate, config.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


class Distilled(NamedTuple):
    """Students after distillation: Hub-named CPU tensors, and rows (student, step, tokens, kl before the step)."""

    states: dict[str, State]
    curve: list[tuple[str, int, int, float]]


class _Student:
    """A model, its float32 master weights and their optimiser, as in mixed-precision pretraining.

    Matrices decay, vectors (norms, biases, A_log, D) do not.
    """

    def __init__(self, config: ModelConfig, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype):
        self.model = HybridLM.from_state(config, state, dtype).to(device)
        self.parameters = dict(self.model.named_parameters())
        self.masters = {name: state[name].to(device, torch.float32, copy=True) for name in self.parameters}
        self.gradients = [torch.empty_like(master) for master in self.masters.values()]
        groups = [
            {"params": [m for m in self.masters.values() if m.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [m for m in self.masters.values() if m.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=device.type == "cuda")

    @torch.no_grad()
    def begin(self) -> None:
        """Start a step: the masters' values, no gradient."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))
        torch._foreach_zero_(self.gradients)

    def accumulate(self, inputs: Tensor, targets: Tensor, teacher: Tensor | None, share: float) -> Tensor:
        """Add the gradient of a micro-batch that is `share` of the batch, towards the teacher's logits (tokens, vocab),
        or without them towards the targets (tokens,). Returns its part of the batch's loss, ()."""
        logits = self.model(inputs).flatten(0, 1)
        loss = cross_entropy(logits, targets).mean() if teacher is None else forward_kl(logits, teacher)
        loss.backward()
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            assert parameter.grad is not None
            gradient.add_(parameter.grad, alpha=share)
            parameter.grad = None
        return loss.detach() * share

    def update(self, rate: float) -> None:
        """One step of the optimiser on what has accumulated, in float32."""
        masters = list(self.masters.values())
        for master, gradient in zip(masters, self.gradients, strict=True):
            master.grad = gradient
        clip_grad_norm_(masters, CLIP_GRAD)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


def least_memory(parent: int, config: CompressConfig) -> float:
    """Bytes that the final distillation holds on its one device, activations and logits not counted: the teacher in
    BF16, and of two students (the compressed and the random one) BF16 weights, float32 masters, gradients and moments.

    Args:
        parent: its parameters; the students have the share of them that the budgets leave.
    """
    student = parent * (config.parameters_fraction or config.memory.budget_fraction)
    return 2 * parent + 2 * (2 + 4 + 4 + 8) * student


def check_memory(parent: int, config: CompressConfig, device: torch.device) -> None:
    """Raise ModelError where the final distillation cannot fit the device: hours before it would."""
    if device.type != "cuda":
        return
    needed, there = least_memory(parent, config), torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise ModelError(
            f"compress: distilling a parent of {parent:,} parameters takes {needed / 2**30:.1f} GiB and more on one "
            f"device, and this one has {there / 2**30:.1f}.\n"
            "Compression runs on one device: choose a smaller parent, or a larger device.")


def distill(
    teacher: HybridLM,
    students: Mapping[str, tuple[ModelConfig, Mapping[str, Tensor]]],
    sequences: Sequence[Tensor],
    tokens: int,
    config: CompressConfig,
    cache: ResultCache,
    name: str,
    progress: Callable[..., None],
    objective: Objective = "kl",
) -> Distilled:
    """Distil the teacher into every student over the first `tokens` tokens of `sequences`.

    A run killed on the way goes on from the last piece `name`, with the same result as an unbroken one: the only state
    is the weights, the optimisers and the step, which is also the position in the data.

    Args:
        teacher: the parent, or what `model.compression.fp8_teacher` makes of it; training runs on its device.
        students: name -> geometry and Hub-named weights, which are left as they are.
        sequences: (sequence_length + 1,) int64 each; at least as many as the tokens need.
        objective: `cross_entropy` leaves the teacher out.
    """
    device, dtype = teacher.lm_head.weight.device, teacher.lm_head.weight.dtype
    batch_tokens = config.global_batch_size * teacher.config.sequence_length
    parts = config.global_batch_size // config.micro_batch_size
    steps = math.ceil(tokens / batch_tokens)
    learners = {student: _Student(*weights, device, dtype) for student, weights in students.items()}
    curve: list[tuple[str, int, int, float]] = []
    saved = cache.load(name)
    if saved:
        curve = saved["curve"]
        for student, learner in learners.items():
            for key, master in learner.masters.items():
                master.copy_(saved["masters"][student][key])
            learner.optimizer.load_state_dict(saved["optimizers"][student])
    waiting: list[Tensor] = []                              # losses of the last steps, (students,) each
    for step in range(saved["step"] if saved else 0, steps):
        for learner in learners.values():
            learner.begin()
        losses = torch.zeros(len(learners), device=device)
        for part in range(parts):
            inputs, targets = _batch(sequences, step * parts + part, config.micro_batch_size, device)
            logits = None
            if objective == "kl":
                with torch.no_grad():
                    logits = teacher(inputs).flatten(0, 1)
            losses += torch.stack([learner.accumulate(inputs, targets, logits, 1 / parts)
                                   for learner in learners.values()])
        rate = learning_rate(config, step, steps)
        for learner in learners.values():
            learner.update(rate)
        waiting.append(losses)
        done = step + 1
        save = done % config.checkpoint_every == 0 or done == steps
        figures: dict[str, float] = {"lr": rate}
        if save or len(waiting) == FETCH_EVERY:
            rows = torch.stack(waiting).tolist()
            for at, row in enumerate(rows, start=done - len(rows) + 1):
                curve += [(student, at, at * batch_tokens, loss)
                          for student, loss in zip(learners, row, strict=True)]
            figures |= {f"{objective}_{student}": loss for student, loss in zip(learners, rows[-1], strict=True)}
            waiting = []
        if save:
            cache.save(name, {
                "step": done,
                "curve": curve,
                "masters": {student: learner.masters for student, learner in learners.items()},
                "optimizers": {student: learner.optimizer.state_dict() for student, learner in learners.items()},
            })
        progress(done, steps, **figures)
    states = {
        student: {key: master.detach().cpu() for key, master in learner.masters.items()}
        for student, learner in learners.items()
    }
    return Distilled(states, curve)


def _batch(sequences: Sequence[Tensor], number: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs (size, sequence) and targets (size x sequence,) of a micro-batch, without waiting for the device."""
    batch = torch.stack([sequences[number * size + i] for i in range(size)])
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:].flatten()
