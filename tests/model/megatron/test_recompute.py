"""Activation recomputation: the same step to the last bit, with less kept for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_engine import HYBRID, RECIPE

from model.megatron.distributed import ONE_COPY, device, process_groups
from model.megatron.documents import find_documents
from model.megatron.precision import choose_precision
from model.megatron.spec import build_model
from model.training.trainer import Trainer

LAYERS = ("mixer", "self_attention", "mlp")


def step(precision: str, recompute: str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Losses, gradients, and bytes kept between forward and backward."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with process_groups():
        model = build_model(HYBRID, choose_precision(precision, device(), 1, 1), ONE_COPY, 1, recompute).to(device())
        ids = torch.randint(0, HYBRID.vocab_size, (4, 17), generator=torch.Generator().manual_seed(1)).to(device())
        inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model(inputs, None, None, labels=labels, packed_seq_params=find_documents(inputs, 0))
        losses.mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return losses.detach(), gradients, sum(size for at, size in kept.items() if at not in parameters)


def note(calls: list[int], number: int, *_: object) -> None:
    calls.append(number)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8"])
def test_same_losses_and_gradients_with_less_kept(precision):
    losses, gradients, kept = step(precision, "")
    for recompute, share in (("-", 1.0), ("M", 0.7), ("M*-", 0.3)):
        again, others, less = step(precision, recompute)
        assert torch.equal(losses, again), recompute
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True)), recompute
        assert less < share * kept, recompute


def test_the_recipe_says_what_is_recomputed(token_files, tmp_path):
    tokens = token_files(tmp_path / "tokens")
    rows, forwards = [], []
    for recompute in ("", "M-"):
        with process_groups():
            recipe = RECIPE.model_copy(update={"recompute": recompute})
            trainer = Trainer(HYBRID, recipe, "bf16", 1, tokens, tmp_path / f"scratch{recompute}", ONE_COPY)
            calls: list[int] = []
            for layer in trainer.model.decoder.layers:
                inner = next(module for name, module in layer.named_children() if name in LAYERS)
                inner.register_forward_pre_hook(partial(note, calls, layer.layer_number))
            rows.append([trainer.train_step(1), trainer.train_step(2)])
        forwards.append([calls.count(number) for number in range(1, 5)])
    assert rows[0] == rows[1]
    assert forwards == [[4, 4, 4, 4], [8, 8, 4, 8]]                     # two steps of two micro-batches; "M-*M"
