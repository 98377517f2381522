"""Referees: sentencepiece document by document, megatron-core's IndexedDatasetBuilder for the bytes of the files."""

import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_pipeline.config import DataError, ExecutorConfig
from data_pipeline.tokenize import tokenization, tokenizer
from data_pipeline.tokenize.tokenization import Counts, most_tokens, tokenize_shards
from data_pipeline.workers.executor import workers
from tests.data_pipeline.small_corpus import write_shards

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LABELS = ["high", "medium", "low"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(tokenizer.train_on([file.read_text() for file in sorted(STDLIB.glob("[a-c]*.py"))], 1024))
    return path


def rows() -> list[dict[str, str]]:
    texts = ["", "</s><unk> \u2581 \u6f22\U0001f600", *(file.read_text() for file in sorted(STDLIB.glob("[a-e]*.py")))]
    return [{"text": text, "domain": ("code", "docs")[number % 7 == 0], "label": LABELS[number % 3]}
            for number, text in enumerate(texts)]


def write(directory: Path, count: int) -> list[Path]:
    return write_shards(directory, rows(), count)


def run(shards: list[Path], model: Path, scratch: Path, count: int = 1) -> dict[str, Counts]:
    with workers(ExecutorConfig(executor="local", workers=count)) as pool:
        return tokenize_shards(shards, model, scratch, pool, lambda *_, **__: None)


def contents(scratch: Path) -> dict[str, bytes]:
    return {str(path.relative_to(scratch)): path.read_bytes() for path in sorted(scratch.glob("train/[!.]*"))}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """One shard, one worker."""
    root = tmp_path_factory.mktemp("whole")
    run(write(root / "shards", 1), model, root / "scratch")
    return root / "scratch"


def test_files_are_megatrons_and_ids_sentencepieces(whole, model, tmp_path):
    referee = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for name in sorted({f"{row['domain']}-{row['label']}" for row in rows()}):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=DType.optimal_dtype(1024))
        for row in rows():
            if f"{row['domain']}-{row['label']}" == name:
                ids = [*referee.encode(row["text"]), referee.eos_id()]
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    theirs = {f"train/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    assert contents(whole) == theirs and len(theirs) == 12


def test_counts(whole, model):
    again = run([Path("part-00000.parquet")], model, whole)         # from what is kept: the shard is not read
    texts = [row["text"] for row in rows() if (row["domain"], row["label"]) == ("docs", "high")]
    referee = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = [token for text in texts for token in referee.encode(text)]
    assert again["train/docs-high"] == Counts(
        documents=len(texts), tokens=len(ids) + len(texts), bytes=sum(len(text.encode()) for text in texts), unknown=0,
        single_bytes=sum(map(referee.is_byte, ids)))
    assert sum(counts.single_bytes for counts in again.values()) >= 7
    assert list(again) == sorted(again)


def test_bytes_of_a_file_are_those_of_its_tokens(whole, model):
    """With characters that are several byte tokens, and U+2581, which is decoded as a space: 2 bytes less."""
    token_bytes = tokenizer.Tokenizer(model).token_bytes
    for name, counts in run([Path("part-00000.parquet")], model, whole).items():
        texts = [row["text"] for row in rows() if f"train/{row['domain']}-{row['label']}" == name]
        assert counts.bytes == len("".join(texts).replace("\u2581", " ").encode())
        assert counts.bytes == sum(int(token_bytes[ids].sum()) for ids in IndexedDataset(str(whole / name)))


@pytest.mark.parametrize(("shards", "count"), [(2, 1), (7, 2)])
def test_neither_shards_nor_workers_change_a_byte(whole, model, tmp_path, shards, count):
    files = write(tmp_path / "shards", shards)
    run(files, model, tmp_path / "scratch", count)
    assert contents(tmp_path / "scratch") == contents(whole)
    assert not list((tmp_path / "scratch/shards").rglob("*.bin"))       # parts are removed once they are merged


@pytest.mark.parametrize("victim", ["encode_shard", "merge"])
def test_an_interrupted_run_goes_on(whole, model, tmp_path, monkeypatch, victim):
    files, calls = write(tmp_path / "shards", 4), []
    whole_function = getattr(tokenization, victim)

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole_function(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenization, victim, interrupted)
        run(files, model, tmp_path / "scratch")
    assert not (tmp_path / "scratch/resumed").exists()
    files[0].unlink()                                                   # done before: not needed again
    run(files, model, tmp_path / "scratch")
    assert (tmp_path / "scratch/resumed").exists()
    assert contents(tmp_path / "scratch") == contents(whole)


@pytest.mark.parametrize("piece", [
    "shards/part-00001/counts.json", "shards/part-00001/train/code-high.bin", "shards/part-00001/train/code-low.idx",
    "train/code-high.bin", "train/code-high.idx"])
def test_a_damaged_piece_is_made_again(whole, model, tmp_path, monkeypatch, capsys, piece):
    """Parts lie there while one file is merged and the others are not."""
    files, merge = write(tmp_path / "shards", 3), tokenization.merge
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenization, "merge", lambda parts, prefix: merge(parts, prefix) if prefix.name == "code-high"
                      and piece.startswith("train/") else interrupt())
        run(files, model, tmp_path / "scratch")
    path = tmp_path / "scratch" / piece
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run(files, model, tmp_path / "scratch")
    assert capsys.readouterr().out.count(f"{path}: damaged; made again.") == 1
    assert contents(tmp_path / "scratch") == contents(whole)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_files_moved_before_a_kill_are_made_again(whole, model, tmp_path):
    files = write(tmp_path / "shards", 2)
    run(files, model, tmp_path / "scratch")
    for suffix in ("bin", "idx"):
        (tmp_path / f"scratch/train/code-low.{suffix}").unlink()
    run(files, model, tmp_path / "scratch")
    assert contents(tmp_path / "scratch") == contents(whole)


def test_a_bad_shard_is_named_and_the_others_are_kept(model, tmp_path):
    files = write(tmp_path / "shards", 3)
    files[1].write_bytes(files[1].read_bytes()[:-30])
    with pytest.raises(DataError, match=r"part-00001.*cannot be read.*\n.*curate"):
        run(files, model, tmp_path / "scratch")
    assert sorted(path.parent.name for path in tmp_path.glob("scratch/shards/*/counts.json")) == [
        "part-00000", "part-00002"]
    assert not (tmp_path / "scratch/train").exists()


def test_most_tokens_bounds_the_tokens(whole, model, tmp_path):
    files = write(tmp_path / "shards", 3)
    with workers(ExecutorConfig(executor="local", workers=1)) as pool:
        most = most_tokens(files, pool)
    counts = run([Path("part-00000.parquet")], model, whole)
    assert list(most) == list(counts)
    for name, bound in most.items():
        texts = [row["text"] for row in rows() if f"train/{row['domain']}-{row['label']}" == name]
        assert bound == sum(len(text.encode()) + 1 for text in texts) >= counts[name].tokens
    assert all(most[name] >= counts[name].tokens for name in most)
