"""Packed documents against each of them run alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_engine import HYBRID, RECIPE, TRANSFORMER
from torch.utils._python_dispatch import TorchDispatchMode

from model.checkpoint import describe, load_weights
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.documents import find_documents
from model.megatron.engine_checkpoint import save_model
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from model.training.token_data import TrainingData
from model.training.trainer import Trainer

EOD = 0
# By chunks of 8: shorter than the convolution, ends inside and at the edge of chunks, over several chunks, unfinished.
LENGTHS = [(1, 2, 5, 8, 3, 11), (30,), (16, 8, 6)]


def packed() -> torch.Tensor:
    ids = torch.randint(1, HYBRID.vocab_size, (len(LENGTHS), 30), generator=torch.Generator().manual_seed(2))
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[[sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]] = EOD
    return ids


def split(ids: torch.Tensor) -> list[torch.Tensor]:
    """Documents of `ids`, (1, length) each: cut before every end-of-document token."""
    return [document[None] for row in ids for document in row.tensor_split((row[1:] == EOD).nonzero().flatten() + 1)]


def test_documents_begin_with_the_mark_as_texts_do_that_are_served_and_evaluated():
    ids = torch.tensor([[5, 0, 0, 7, 8, 0], [0, 1, 2, 3, 4, 5]])
    documents = find_documents(ids, EOD)
    assert documents.seq_idx.dtype is torch.int32
    assert documents.seq_idx.tolist() == [[0, 1, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1]]
    assert [document.shape[1] for document in split(packed())] == [length for row in LENGTHS for length in row]


def test_layers_share_one_mask_of_attention():
    """A Transformer, with attention in every block, made one in each."""
    class Masks(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.made += function is torch.ops.aten.tril_.default
            return function(*args, **(kwargs or {}))

    assert TRANSFORMER.pattern.count("*") == 2
    with process_groups():
        model = build_model(TRANSFORMER, Precision("float32"), ONE_COPY, seed=1)
        with Masks() as masks:
            model(ids := packed(), None, None, packed_seq_params=find_documents(ids, EOD)).sum().backward()
    assert masks.made == 1


@pytest.mark.parametrize("config", [HYBRID, TRANSFORMER], ids=["hybrid", "transformer"])
def test_packed_is_each_document_alone(config):
    """Logits, and the gradient of every parameter."""
    ids = packed()
    weights = torch.randn(ids.numel(), config.vocab_size, generator=torch.Generator().manual_seed(3))
    results = []
    with process_groups():
        model = build_model(config, Precision("float32"), ONE_COPY, seed=1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for run in (
            lambda: model(ids, None, None, packed_seq_params=find_documents(ids, EOD)).flatten(0, 1),
            lambda: torch.cat([model(document, None, None)[0] for document in split(ids)]),
            lambda: model(ids, None, None).flatten(0, 1),
        ):
            model.zero_grad()
            logits = run()
            (logits * weights).sum().backward()
            results.append((logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (logits, gradients), (alone, expected), (running_on, _) = results
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    for ours, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5 * true.abs().max().item())
    assert (running_on - alone).norm() > 0.01 * alone.norm()            # boundaries matter to this model


@pytest.mark.parametrize("reset", [True, False])
def test_training_resets_where_the_recipe_says_so(reset, token_files, tmp_path):
    tokens = token_files(tmp_path / "tokens")
    recipe = RECIPE.model_copy(update={"reset_at_documents": reset})
    with process_groups():
        trainer = Trainer(HYBRID, recipe, "float32", 1, tokens, tmp_path, ONE_COPY)
        save_model(tmp_path / "start", trainer.model)
        loss = trainer.train_step(1)["loss"]
    describe(tmp_path / "start", HYBRID, {})
    model = HybridLM.from_state(*load_weights(tmp_path / "start")[:2])
    data = TrainingData(tokens, 16, 24, 1, tmp_path / "index")
    batch = torch.stack([data[sample] for sample in range(4)])
    inputs, labels = batch[:, :-1], batch[:, 1:]
    assert (inputs[:, 1:] == EOD).any()
    with torch.no_grad():
        logits = torch.cat([model(part).flatten(0, 1) for part in (split(inputs) if reset else [inputs])])
    assert loss == pytest.approx(F.cross_entropy(logits, labels.flatten()).item(), rel=1e-5)
