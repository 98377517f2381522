"""Distillation: a student learns the parent's next-token distribution (paper section 3).

The loss is the forward KL divergence KL(parent || student) of the logits at temperature 1, and nothing else: no
cross-entropy, no hidden states. Students stand side by side in one run, so that all see the same tokens in the same
order and the parent's logits are computed once. Both sides run in BF16, over float32 master weights of the students.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from model.compression.config import CompressConfig
from model.compression.prune import State
from model.compression.resume import Pieces
from model.config import ModelConfig
from model.hybrid_lm import HybridLM

# The paper's pretraining optimiser (section 2.4).
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_GRAD = 1.0
ROWS = 256                      # tokens whose logits are in float32 at one time


class _ForwardKL(torch.autograd.Function):
    """Mean KL, its gradient (softmax(student) - softmax(teacher)) / tokens made on the way, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float64)
        for part, expected, out in zip(
            student.split(ROWS), teacher.split(ROWS), gradient.split(ROWS), strict=True
        ):
            exact = torch.promote_types(part.dtype, torch.float32)
            logs, target = part.to(exact).log_softmax(dim=-1), expected.to(exact).log_softmax(dim=-1)
            chance = target.exp()
            total += torch.linalg.vecdot(chance, target - logs).double().sum()
            out.copy_((logs.exp_() - chance) / len(student))
        ctx.save_for_backward(gradient)
        return (total / len(student)).to(torch.promote_types(student.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats, the mean over tokens; no gradient goes to the teacher.

    Args:
        student, teacher: (tokens, vocab) logits of any float type; the sums run in float32 or better.
    """
    return _ForwardKL.apply(student, teacher)


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
    """A BF16 model, its float32 master weights and their optimiser, as in mixed-precision pretraining.

    Matrices decay, vectors (norms, biases, A_log, D) do not.
    """

    def __init__(self, config: ModelConfig, state: Mapping[str, Tensor], device: torch.device):
        self.model = HybridLM.from_state(config, state, torch.bfloat16).to(device)
        self.masters = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in state.items()}
        groups = [
            {"params": [m for m in self.masters.values() if m.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [m for m in self.masters.values() if m.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=ADAM_BETAS)

    def step(self, inputs: Tensor, teacher: Tensor, rate: float) -> Tensor:
        self.model.load_state_dict(self.masters)
        loss = forward_kl(self.model(inputs).flatten(0, 1), teacher)
        loss.backward()
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            self.masters[name].grad, parameter.grad = parameter.grad.float(), None
        clip_grad_norm_(self.masters.values(), CLIP_GRAD)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.detach()


def distill(
    parent: HybridLM,
    students: Mapping[str, tuple[ModelConfig, Mapping[str, Tensor]]],
    sequences: Sequence[Tensor],
    tokens: int,
    config: CompressConfig,
    pieces: Pieces,
    name: str,
    progress: Callable[..., None],
) -> Distilled:
    """Distil the parent into every student over the first `tokens` tokens of `sequences`.

    A run killed on the way goes on from the last piece `name`, with the same result as an unbroken one: the only state
    is the weights, the optimisers and the step, which is also the position in the data.

    Args:
        parent: its device is where the training runs.
        students: name -> geometry and Hub-named weights, which are left as they are.
        sequences: (sequence_length + 1,) int64 each; at least as many as the tokens need.
    """
    device = parent.lm_head.weight.device
    teacher = HybridLM.from_state(parent.config, parent.state_dict(), torch.bfloat16)
    batch_tokens = config.micro_batch_size * parent.config.sequence_length
    steps = math.ceil(tokens / batch_tokens)
    learners = {student: _Student(*weights, device) for student, weights in students.items()}
    curve: list[tuple[str, int, int, float]] = []
    saved = pieces.load(name)
    if saved:
        curve = saved["curve"]
        for student, learner in learners.items():
            for key, master in learner.masters.items():
                master.copy_(saved["masters"][student][key])
            learner.optimizer.load_state_dict(saved["optimizers"][student])
    for step in range(saved["step"] if saved else 0, steps):
        first = step * config.micro_batch_size
        batch = torch.stack([sequences[first + i] for i in range(config.micro_batch_size)]).to(device)
        inputs = batch[:, :-1]
        with torch.no_grad():
            logits = teacher(inputs).flatten(0, 1)
        rate = learning_rate(config, step, steps)
        losses = {student: learner.step(inputs, logits, rate).item() for student, learner in learners.items()}
        curve += [(student, step + 1, (step + 1) * batch_tokens, loss) for student, loss in losses.items()]
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
            pieces.save(name, {
                "step": step + 1,
                "curve": curve,
                "masters": {student: learner.masters for student, learner in learners.items()},
                "optimizers": {student: learner.optimizer.state_dict() for student, learner in learners.items()},
            })
        progress(step + 1, steps, lr=rate, **{f"kl_{student}": loss for student, loss in losses.items()})
    states = {
        student: {key: master.detach().cpu() for key, master in learner.masters.items()}
        for student, learner in learners.items()
    }
    return Distilled(states, curve)
