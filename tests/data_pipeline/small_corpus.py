"""A small curated directory, as the stage `curate` writes it, from the standard library of the running Python."""

from __future__ import annotations

import ast
import functools
import json
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TRAIN = ("asyncio", "logging", "email", "concurrent", "html")
HELD_OUT = ("http", "json", "unittest", "importlib", "xml")


def write_curated(
    directory: Path, train: Iterable[str] = TRAIN, held_out: Iterable[str] = HELD_OUT, labels: Sequence[str] = ("high",)
) -> Path:
    """`train` and `held_out` name standard-library packages: code as `code`, docstrings as `docs`, which have the
    `labels` in turn. 13-grams."""
    manifest: dict[str, object] = {"corpus_digest": "0" * 64, "decontamination_ngram": 13}
    for split, packages in (("train", train), ("heldout", held_out)):
        rows = [row for package in packages for row in _documents(package)]
        if split == "train":
            rows = [{**row, "quality": 1.0, "label": labels[number // 2 % len(labels)]}
                    for number, row in enumerate(rows)]
        (directory / split).mkdir(parents=True)
        for number in range(2):
            pq.write_table(pa.Table.from_pylist(rows[number::2]), directory / split / f"part-{number:05d}.parquet")
        manifest[split] = {
            domain: {
                "documents": sum(row["domain"] == domain for row in rows),
                "bytes": sum(len(str(row["text"]).encode()) for row in rows if row["domain"] == domain),
                "sources": [f"python/{package}" for package in packages],
            }
            for domain in ("code", "docs")
        }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def write_shards(directory: Path, rows: list[dict[str, str]], count: int) -> list[Path]:
    """`rows` in order, divided among `count` files of unequal length."""
    directory.mkdir(parents=True)
    ends = [len(rows) * (number + 1) ** 2 // count**2 for number in range(count)]
    files = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        files.append(directory / f"part-{number:05d}.parquet")
        pq.write_table(pa.Table.from_pylist(rows[start:end], pa.schema([(key, pa.string()) for key in rows[0]])),
                       files[-1])
    return files


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of the kind that Nemotron-H has; 2 is `</s>`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


@functools.cache
def _documents(package: str) -> list[dict[str, object]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for path in sorted((root / package).rglob("*.py")):
        code = path.read_text(encoding="utf-8")
        nodes = ast.walk(ast.parse(code))
        documented = [node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        docstrings = [text for node in documented if (text := ast.get_docstring(node))]
        for domain, text in (("code", code), ("docs", "\n\n".join(docstrings) + "\n")):
            if len(text) >= 200:
                rows.append(
                    {
                        "id": xxhash.xxh3_128_hexdigest(text.encode()),
                        "text": text,
                        "source": f"python/{package}",
                        "path": str(path.relative_to(root)),
                        "domain": domain,
                        "license": "PSF-2.0",
                    }
                )
    return rows


def encode(text: str) -> list[str]:
    """Tokens of a simple tokenizer: words, digits, white space, and every other sign."""
    return re.findall(r"[^\W\d]+|\s+|.", text)
