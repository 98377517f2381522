"""Referee: megatron-core writes the same bytes and reads ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from data_pipeline.config import DataError
from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter, merge, read_lengths


def documents(vocab_size: int, count: int = 40) -> list[np.ndarray]:
    draw = np.random.default_rng(vocab_size)
    return [draw.integers(0, vocab_size, draw.integers(1, 90)) for _ in range(count)]


def write(prefix: Path, vocab_size: int, texts: list[np.ndarray]) -> None:
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for text in texts:
            writer.add(text)


@pytest.mark.parametrize("vocab_size", [4096, 65_499, 65_500, 131_072])
@pytest.mark.parametrize("count", [1, 40])
def test_same_bytes_as_megatron(tmp_path, vocab_size, count):
    texts = documents(vocab_size, count)
    write(tmp_path / "ours", vocab_size, texts)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for text in texts:
        builder.add_document(torch.from_numpy(text), [len(text)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("vocab_size", [4096, 131_072])
@pytest.mark.parametrize("cuts", [[0, 40], [0, 7, 7, 31, 40], [0, 0, 1, 40, 40]])
def test_merged_parts_are_the_file_written_at_once(tmp_path, vocab_size, cuts):
    texts = documents(vocab_size)
    write(tmp_path / "once", vocab_size, texts)
    parts = [tmp_path / "parts" / str(number) for number in range(len(cuts) - 1)]
    for part, start, end in zip(parts, cuts, cuts[1:], strict=False):
        with IndexedDatasetWriter(part, vocab_size) as writer:
            ids = np.concatenate([*texts[start:end], np.empty(0, np.int64)]).astype(np.int32)
            writer.extend(ids, np.array([len(text) for text in texts[start:end]]))
    assert merge(parts, tmp_path / "merged") == sum(map(len, texts))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == (tmp_path / f"once.{suffix}").read_bytes()


def test_parts_of_two_types_are_refused_and_so_is_a_damaged_one(tmp_path):
    write(tmp_path / "a", 4096, documents(4096))
    write(tmp_path / "b", 131_072, documents(4096))
    with pytest.raises(DataError, match=r"ids of 2 types"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"a\.bin: its size"):
        merge([tmp_path / "a"], tmp_path / "c")
    assert not (tmp_path / "c.idx").exists()


def test_an_empty_file_has_no_documents(tmp_path):
    write(tmp_path / "none", 4096, [])
    assert read_lengths(tmp_path / "none")[1].tolist() == []


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), IndexedDatasetWriter(tmp_path / "a", 4096) as writer:
        writer.add([1, 2, 3])
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_ids_beyond_the_type_are_refused(tmp_path):
    for ids in ([70_000], [-1], np.array([70_000]), np.array([-1])):
        with pytest.raises(OverflowError), IndexedDatasetWriter(tmp_path / "a", 4096) as writer:
            writer.add(ids)


def test_damage_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.idx: not found"):
        read_lengths(tmp_path / "a")
    write(tmp_path / "a", 4096, documents(4096))
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"a\.bin: its size"):
        read_lengths(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(whole)
    index = (tmp_path / "a.idx").read_bytes()
    for broken in (index[:-1], b"X" + index[1:], index[:17] + b"\x07" + index[18:], b""):
        (tmp_path / "a.idx").write_bytes(broken)
        with pytest.raises(DataError, match="not a Megatron index"):
            read_lengths(tmp_path / "a")
