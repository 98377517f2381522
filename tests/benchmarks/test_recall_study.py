"""The tasks of the recall study ask for what the sequence holds, and its models differ as they should."""

from __future__ import annotations

import pytest
import torch

from benchmarks.recall_study import CPU, IGNORED, TINY, copy_batch, lengths, model_config, patterns, recall_batch


def test_every_key_is_asked_for_the_value_that_stood_after_it() -> None:
    ids, labels = recall_batch(CPU, CPU.pairs, torch.Generator().manual_seed(1))
    assert ids.shape == (CPU.batch, 4 * CPU.pairs)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        shown = dict(zip(row[0 : 2 * CPU.pairs : 2], row[1 : 2 * CPU.pairs : 2], strict=True))
        assert len(shown) == CPU.pairs
        for place, label in enumerate(wanted):
            assert label == (shown[row[place]] if place >= 2 * CPU.pairs and place % 2 == 0 else IGNORED)
            if label != IGNORED:
                assert row[place + 1] == label              # and the next token is it


def test_a_copy_asks_for_the_next_token_after_the_mark() -> None:
    ids, labels = copy_batch(CPU, CPU.copied, torch.Generator().manual_seed(1))
    asked = labels != IGNORED
    assert asked.sum(1).tolist() == [CPU.copied] * CPU.batch
    assert torch.equal(labels[:, :-1][asked[:, :-1]], ids[:, 1:][asked[:, :-1]])
    assert (ids[:, CPU.copied] == 2 * CPU.tokens).all() and asked[:, CPU.copied].all()


@pytest.mark.parametrize("sizes", [CPU, TINY])
def test_models_differ_in_their_share_of_attention(sizes) -> None:
    shares = {name: pattern.count("*") / len(pattern) for name, pattern in patterns(sizes.layers).items()}
    assert {len(pattern) for pattern in patterns(sizes.layers).values()} == {sizes.layers}
    assert shares["0"] == 0 and "M" not in patterns(sizes.layers)["100"]
    assert shares["8"] == pytest.approx(0.08, abs=0.01) and shares["25"] == pytest.approx(0.25, abs=0.03)
    for pattern in patterns(sizes.layers).values():
        assert model_config(pattern, sizes).position_embedding == ("none" if "M" in pattern else "rope")
    assert lengths("recall", sizes)[-1] == sizes.pairs <= sizes.tokens
