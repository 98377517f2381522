from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter
from model.config import ModelError
from model.training.token_data import Prefetcher, TrainingData, check, digests, domains, validation


@pytest.fixture
def tokens(token_files, tmp_path):
    return token_files(tmp_path / "tokens")


def documents(tokens, name: str) -> list[np.ndarray]:
    dataset = IndexedDataset(str(tokens / name))
    return [np.array(dataset[index]) for index in range(len(dataset))]


def files_of(data: TrainingData, samples: range) -> np.ndarray:
    return np.bincount([data.file_of_sample[sample] for sample in samples], minlength=len(data.names)) / len(samples)


def test_phases_draw_by_their_weights(tokens, tmp_path):
    data = TrainingData(tokens, 16, 500, 1, tmp_path / "cache")
    assert len(data) == 500
    assert data.names == ["train/code-high", "train/code-low", "train/docs-high"]
    assert files_of(data, range(300)) == pytest.approx([0.3, 0.2, 0.5], abs=0.01)
    assert files_of(data, range(300, 500)) == pytest.approx([0.4, 0.0, 0.6], abs=0.01)


def test_a_damaged_index_is_made_again(tokens, tmp_path, capsys):
    cache = tmp_path / "cache"
    whole = TrainingData(tokens, 16, 500, 1, cache)
    before = [whole[sample].tolist() for sample in range(500)]
    for path in sorted(cache.glob("*.npy")):
        content = path.read_bytes()
        path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
        data = TrainingData(tokens, 16, 500, 1, cache)
        assert [data[sample].tolist() for sample in range(500)] == before
        assert path.read_bytes() == content and f"{path}: damaged or replaced" in capsys.readouterr().out


def test_the_index_of_other_text_is_not_taken(token_files, tmp_path):
    """Files made again under their names: here with more documents, of which the old index knows a part."""
    directory, cache = tmp_path / "tokens", tmp_path / "cache"
    TrainingData(token_files(directory, documents=30), 16, 60, 1, cache)
    token_files(directory, documents=60)
    found, expected = (TrainingData(directory, 16, 60, 1, place) for place in (cache, tmp_path / "new"))
    assert [found[sample].tolist() for sample in range(60)] == [expected[sample].tolist() for sample in range(60)]


def test_samples_are_stretches_of_their_file_and_none_comes_twice_within_an_epoch(tokens, tmp_path):
    """60 samples of 16 take less than one epoch of any file: over both phases each is another stretch."""
    data = TrainingData(tokens, 16, 60, 1, tmp_path / "cache")
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for sample in range(60):
        file = int(data.file_of_sample[sample])
        position = int(data.position_in_file[sample])
        assert position not in seen[file]
        seen[file].add(position)
        item = data[sample]
        assert item.dtype is torch.int64 and item.shape == (17,)
    for file, positions in seen.items():
        assert positions == set(range(len(positions)))          # goes on where the earlier phase stopped
        names = documents(tokens, data.names[file])
        pairs = {pair for document in names for pair in zip(document[:-1].tolist(), document[1:].tolist(), strict=True)}
        samples = [data[sample] for sample in range(60) if data.file_of_sample[sample] == file]
        for item in samples:
            assert all(
                pair in pairs for pair in zip(item[:-1].tolist(), item[1:].tolist(), strict=True) if pair[0] != 0
            )
        assert len({tuple(item.tolist()) for item in samples}) == len(samples)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), length=st.sampled_from([3, 16]),
    readings=st.floats(0.2, 5), seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_no_document_begins_again_before_all_of_its_file_was_read(lengths, length, readings, seed):
    with TemporaryDirectory() as directory:
        tokens, number = Path(directory), max(1, round(readings * sum(lengths) / length))
        data = TrainingData(one_file(tokens, lengths), length, number, seed, tokens / "cache")
        seen = np.zeros(len(lengths), np.int64)                     # tokens of each document
        for sample in range(len(data)):
            for document in data[sample][:-1].tolist():
                assert (seen // lengths).min() >= seen[document] // lengths[document]
                seen[document] += 1


def test_one_reading_s_worth_of_samples_holds_every_document(tmp_path):
    """Megatron shuffles readings together: 74, 69 and 66 % of the documents were seen at 2.4, 4.6 and 8 readings."""
    lengths = [16] * 2000
    tokens = one_file(tmp_path, lengths)
    for readings in (1, 2.4, 8):
        data = TrainingData(tokens, 16, int(readings * 2000), 1, tmp_path / f"cache-{readings}")
        samples = [data[sample] for sample in range(2000)]
        assert np.bincount(np.concatenate([sample[:-1] for sample in samples]), minlength=2000).tolist() == lengths
        assert (np.diff(data.files[0].shuffle_index[:2000]) != 1).mean() > 0.99
        written = {file: file.stat().st_mtime_ns for file in (tmp_path / f"cache-{readings}").iterdir()}
        again = TrainingData(tokens, 16, int(readings * 2000), 1, tmp_path / f"cache-{readings}")
        assert all(torch.equal(again[number], sample) for number, sample in enumerate(samples))
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / f"cache-{readings}").iterdir()} == written


def test_phases_and_files_that_a_short_run_leaves_out_are_named(tokens, tmp_path, capsys):
    TrainingData(tokens, 16, 5, 1, tmp_path / "five")
    assert capsys.readouterr().out == ""
    data = TrainingData(tokens, 16, 1, 1, tmp_path / "one")
    (name,) = {name for name, file in zip(data.names, data.files, strict=True) if file}
    others = ", ".join(other for other in data.names if other != name)
    assert capsys.readouterr().out == (
        f"{tokens}/blend.json: of 1 sample there is none for the phase until 1.0, {others}.\n")


def one_file(directory: Path, lengths: list[int]) -> Path:
    """A tokens directory with one training file, its document number n as often the id n as `lengths` says."""
    with IndexedDatasetWriter(directory / "train/code-high", len(lengths)) as writer:
        for number, length in enumerate(lengths):
            writer.add([number] * length)
    contents = {"vocab_size": len(lengths), "eod_id": 0, "dtype": "uint16", "tokenizer_digest": "aa",
                "corpus_digest": "bb", "files": {"train/code-high": {"tokens": sum(lengths)}}}
    (directory / "tokens.json").write_text(json.dumps(contents))
    (directory / "blend.json").write_text(json.dumps({"phases": [{"until": 1.0, "weights": {"train/code-high": 1}}]}))
    return directory


def test_same_seed_same_samples_with_and_without_the_cache(tokens, tmp_path):
    first = TrainingData(tokens, 16, 90, 1, tmp_path / "a")
    cached = TrainingData(tokens, 16, 90, 1, tmp_path / "a")
    rebuilt = TrainingData(tokens, 16, 90, 1, tmp_path / "b")
    other = TrainingData(tokens, 16, 90, 2, tmp_path / "b")
    for sample in (89, 0, 45):
        assert torch.equal(first[sample], cached[sample])
        assert torch.equal(first[sample], rebuilt[sample])
    assert not all(torch.equal(first[sample], other[sample]) for sample in range(10))


def test_a_cache_left_half_written_is_built_again(tokens, tmp_path):
    expected = TrainingData(tokens, 16, 90, 1, tmp_path / "whole")
    (tmp_path / ".index.partial").mkdir()
    for file in (tmp_path / "whole").iterdir():
        (tmp_path / ".index.partial" / file.name).write_bytes(file.read_bytes()[:100])
    data = TrainingData(tokens, 16, 90, 1, tmp_path / "index")
    assert torch.equal(data[80], expected[80])
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir())


def test_validation_predicts_every_token_once(tokens):
    data = validation(tokens, "code", 16)
    stream = np.concatenate(documents(tokens, "validation/code"))
    assert torch.equal(data.sequences[0], torch.from_numpy(stream[:17].astype(np.int64)))
    predicted = data.sequences[:, 1:].flatten()
    assert torch.equal(predicted, torch.from_numpy(stream[1 : 1 + len(predicted)].astype(np.int64)))
    assert len(stream) - 1 - len(predicted) < 16
    assert data.bytes == sum(1 + token % 4 for token in predicted.tolist() if token)
    part = data.first(3)
    assert len(part.sequences) == 3
    assert part.bytes == sum(1 + token % 4 for token in part.sequences[:, 1:].flatten().tolist() if token)
    assert data.first(10**6).bytes == data.bytes


def test_domains_and_digests_come_from_tokens_json(tokens):
    assert domains(tokens) == ["code", "docs"]
    assert digests(tokens) == {"tokenizer_digest": "aa", "corpus_digest": "bb"}


def edit(name: str | None = None, **figures):
    """Puts other figures into tokens.json, of a file where it is named; what is None goes."""
    def harm(tokens) -> None:
        contents = json.loads((tokens / "tokens.json").read_text())
        (contents["files"].setdefault(name, {}) if name else contents).update(figures)
        (tokens / "tokens.json").write_text(json.dumps({
            key: value for key, value in contents.items() if value is not None}))
    return harm


def token_bytes(count: int):
    return lambda tokens: np.save(tokens / "token_bytes.npy", np.ones(count, np.uint16))


def write(name: str, content: bytes | None):
    return lambda tokens: (tokens / name).unlink() if content is None else (tokens / name).write_bytes(content)


def whole(tokens):
    return check(tokens, 64)


def validate(tokens):
    return validation(tokens, "code", 16)


@pytest.mark.parametrize(("read", "harm", "message"), [
    (whole, write("train/code-high.bin", b"12"), "train/code-high.bin: .* bytes, and tokens.json says"),
    (whole, write("train/code-low.idx", None), "train/code-low.idx: not found"),
    (whole, write("validation/docs.bin", None), "validation/docs.bin: not found"),
    (whole, write("tokens.json", b"{"), "tokens.json: cannot be read"),
    (whole, write("tokens.json", None), "tokens.json: cannot be read"),
    (whole, edit(tokenizer_digest=None), "tokens.json: without tokenizer_digest"),
    (whole, write("token_bytes.npy", None), "token_bytes.npy: cannot be read"),
    (whole, write("token_bytes.npy", b""), "token_bytes.npy: cannot be read"),
    (whole, edit("train/code-low", documents=2**31), r"train/code-low.bin: 2,147,483,648 documents, of which Megatron"),
    (whole, token_bytes(63), r"of shape \(63,\)"),
    (lambda tokens: check(tokens, 63), lambda tokens: check(tokens, 512), "vocabulary of 64 ids, and the model has 63"),
    (validate, edit("validation/code", bytes=1), "by token_bytes.npy its tokens are not the 1 "),
    (validate, token_bytes(64), "its tokens are not the"),
    (validate, token_bytes(63), "its tokens are not the"),
    (validate, edit("validation/code", tokens=0), "no text to validate on"),
    (lambda tokens: validation(tokens, "poems", 16), whole, "validation/poems"),
    (lambda tokens: validation(tokens, "code", 100_000), whole, "fewer than one sequence"),
    (domains, edit(files={}), "no validation/DOMAIN"),
    (domains, edit("validation/all"), "a domain is called all"),
    (domains, edit("validation/first"), "a domain is called first"),
    (lambda tokens: TrainingData(tokens, 16, 60, 1, tokens / "cache"), edit("train/code-low", tokens=0),
     "train/code-low"),
])
def test_what_is_wrong_with_token_files_is_named(tokens, read, harm, message):
    whole(tokens)
    harm(tokens)
    with pytest.raises(ModelError, match=message) as error:
        read(tokens)
    assert str(error.value).count("\n") == 1


def test_batches_ahead_are_those_asked_for():
    made = []
    batches = Prefetcher(lambda number: made.append(number) or torch.tensor(number), last=6)
    assert [batches[number].item() for number in (1, 2, 3, 3, 6, 5)] == [1, 2, 3, 3, 6, 5]
    batches.close()
    assert max(made) == 6 and {1, 2, 3, 4, 5, 6} == set(made)
    failing = Prefetcher(lambda number: 1 / 0, last=3)
    with pytest.raises(ZeroDivisionError):
        failing[1]
    failing.close()
