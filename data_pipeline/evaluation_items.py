"""Evaluation items from held-out text, by a seeded function, none of which shares an n-gram with training text.

Four kinds, each of which a model of a few million parameters can say something about after minutes of training:

- bits per byte: held-out documents of each domain;
- `syntax_pairs`: a line of real Python against the same line made ungrammatical, after the lines before it;
- `cloze`: the true next word of a passage among words of the same length from other passages;
- `recall`: `key = value` lines, then a key again: which of the values? (associative recall in context)

A score means little without what no training at all reaches. `control` gives that: the stronger of DEFLATE and LZMA
on the same items. Without care a compressor solves such tasks: naive cloze and syntax items gave it 0.57 and 0.96. So
in these two tasks the wrong choices are ones that both compressors need as many bytes for as for the true one. `recall`
is left as it is: finding a repeated key is exactly what a compressor does; its score says that no knowledge is needed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.config import DataError
from data_pipeline.steps.decontaminate import hash_set, is_in, ngram_hashes
from data_pipeline.syntax_pairs import faulty_lines

OVERSUPPLY = 2                  # candidates made for each item wanted: some are refused or dropped for balance
DOCUMENTS_PER_DOMAIN = 12       # at least, so that the standard error over documents means something
ITEMS_PER_DOCUMENT = 6


@dataclass(frozen=True)
class TextItem:
    """The start of a held-out document, to be predicted whole."""

    id: str
    text: str


@dataclass(frozen=True)
class ChoiceItem:
    """`choices[answer]` is what really follows `context`. Nothing stands between context and choice."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class EvaluationItems:
    """All items: `texts[domain]`, `tasks[task]`; `refused` candidates shared an n-gram with training text."""

    texts: dict[str, list[TextItem]]
    tasks: dict[str, list[ChoiceItem]]
    refused: int

    def digest(self) -> str:
        """SHA-256 over every item in order: equal digests mean that two models were asked the same."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Document:
    id: str
    domain: str
    text: str


def build(
    curated: Path,
    *,
    items_per_task: int,
    bits_per_byte_kilobytes: int,
    recall_pairs: int,
    context_tokens: int,
    seed: int,
) -> EvaluationItems:
    """Items from `curated/heldout`, checked against `curated/train`.

    Contexts are kept to two characters a token of `context_tokens`, so that they are not cut off. A task has fewer than
    `items_per_task` items where the held-out text yields no more.

    Raises DataError where a domain or task gets no item at all, or a recall item cannot fit the context.
    """
    manifest = _read_manifest(curated)
    documents = [Document(**row) for row in _rows(curated / "heldout", ["id", "domain", "text"])]
    by_domain = {
        domain: [document for document in documents if document.domain == domain] for domain in manifest["heldout"]
    }
    wanted = OVERSUPPLY * items_per_task
    domain_bytes = 1000 * bits_per_byte_kilobytes
    texts = {
        domain: _texts(members, domain_bytes, random.Random(f"{seed}:texts:{domain}"))
        for domain, members in by_domain.items()
    }
    tasks = {
        "syntax_pairs": _syntax_pairs(
            by_domain.get("code", []), wanted, context_tokens, random.Random(f"{seed}:syntax_pairs")
        ),
        "cloze": _cloze(by_domain, wanted, 2 * context_tokens, random.Random(f"{seed}:cloze")),
        "recall": _recall(wanted, recall_pairs, context_tokens, random.Random(f"{seed}:recall")),
    }
    candidates = [item.text for items in texts.values() for item in items]
    candidates += [item.context + item.choices[item.answer] for items in tasks.values() for item in items]
    seen = set(_seen_in_training(candidates, curated / "train", manifest["decontamination_ngram"]))
    texts = {
        domain: _up_to_bytes([item for item in items if item.text not in seen], domain_bytes)
        for domain, items in texts.items()
    }
    tasks = {
        task: [item for item in items if item.context + item.choices[item.answer] not in seen][:items_per_task]
        for task, items in tasks.items()
    }
    for name, items in [*texts.items(), *tasks.items()]:
        if not items:
            raise DataError(
                f"{curated}/heldout: no item for `{name}` could be made of the held-out text.\n"
                "Raise `curate.megabytes_per_domain` or `curate.held_out_fraction`, or lower `evaluate.context_tokens`."
            )
    return EvaluationItems(texts, tasks, refused=sum(text in seen for text in candidates))


# --- reading ------------------------------------------------------------------------------------------------------


def _read_manifest(curated: Path) -> dict[str, Any]:
    path = curated / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        return {key: manifest[key] for key in ("decontamination_ngram", "heldout")}
    except FileNotFoundError:
        raise DataError(f"{path}: not found.\nRun the stage `curate`.") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{path}: not a manifest of curated text ({error!r}).\nRun the stage `curate` again.") from None


def _rows(directory: Path, columns: list[str]) -> Iterator[dict[str, str]]:
    """Rows of the Parquet shards in order, a batch at a time."""
    shards = sorted(directory.glob("part-*.parquet"))
    if not shards:
        raise DataError(f"{directory}: no part-*.parquet.\nRun the stage `curate`.")
    for shard in shards:
        for batch in pq.ParquetFile(shard).iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()


def _seen_in_training(texts: Sequence[str], train: Path, n: int) -> list[str]:
    """Those of `texts` that share an n-gram of words with a training document."""
    hashes = [ngram_hashes(text, n) for text in texts]
    known = np.unique(np.concatenate(hashes))
    table, found = hash_set(known), np.zeros(len(known), dtype=bool)
    for row in _rows(train, ["text"]):
        there = ngram_hashes(row["text"], n)
        found[np.searchsorted(known, there[is_in(there, table)])] = True
    return [text for text, mine in zip(texts, hashes, strict=True) if found[np.searchsorted(known, mine)].any()]


# --- bits per byte ------------------------------------------------------------------------------------------------


def _texts(documents: list[Document], domain_bytes: int, rng: random.Random) -> list[TextItem]:
    """Whole documents, or their first lines up to a twelfth of the domain's bytes."""
    longest = min(16_384, max(512, domain_bytes // DOCUMENTS_PER_DOMAIN))
    items = []
    for document in rng.sample(documents, len(documents)):
        text = _first_bytes(document.text, longest)
        if text.strip():
            items.append(TextItem(f"bits_per_byte_{document.domain}/{document.id[:16]}", text))
    return _up_to_bytes(items, OVERSUPPLY * domain_bytes)


def _first_bytes(text: str, size: int) -> str:
    """`text` if it has at most `size` bytes of UTF-8, else as many whole lines (or characters) as fit."""
    data = text.encode()
    if len(data) <= size:
        return text
    cut = data[:size].decode(errors="ignore")
    return cut[: cut.rfind("\n") + 1] or cut


def _up_to_bytes(items: list[TextItem], size: int) -> list[TextItem]:
    """The first items with at most `size` bytes together, at least one if there is any."""
    total = 0
    kept: list[TextItem] = []
    for item in items:
        total += len(item.text.encode())
        if kept and total > size:
            break
        kept.append(item)
    return kept


# --- syntax pairs -------------------------------------------------------------------------------------------------


def _syntax_pairs(documents: list[Document], wanted: int, context_size: int, rng: random.Random) -> list[ChoiceItem]:
    """A true line and the same line with a fault, after the lines before it.

    The fault is decided by what stands before and on the line: with it, no continuation is Python.
    """
    items: list[ChoiceItem] = []
    used: Counter[str] = Counter()
    for document in rng.sample(documents, len(documents)):
        if len(items) >= wanted:
            break
        lines = document.text.split("\n")

        def admissible(row: int, wrong: str, lines: list[str] = lines) -> bool:
            context = _last_lines(lines[:row], context_size)
            long_enough = len(context.strip()) >= context_size // 4
            return long_enough and _costs_are(context + wrong + "\n", _costs(context + lines[row] + "\n"))

        for row, wrong in islice(faulty_lines(document.text, used, rng, admissible), ITEMS_PER_DOCUMENT):
            context = _last_lines(lines[:row], context_size)
            identity = f"syntax_pairs/{document.id[:16]}/{row + 1}"
            items.append(_shuffled(identity, context, (lines[row] + "\n", wrong + "\n"), rng))
    return items


def _last_lines(lines: list[str], size: int) -> str:
    """As many of the last `lines` as fit `size` characters, each with its line end."""
    kept: list[str] = []
    for line in reversed(lines):
        size -= len(line) + 1
        if size < 0:
            break
        kept.append(line + "\n")
    return "".join(reversed(kept))


# --- cloze --------------------------------------------------------------------------------------------------------

WORD = re.compile(r"(?<=\S) ([A-Za-z_][A-Za-z0-9_]{2,11})(?![A-Za-z0-9_])")
TRIED_DISTRACTORS = 160


def _cloze(
    by_domain: dict[str, list[Document]], wanted: int, context_size: int, rng: random.Random
) -> list[ChoiceItem]:
    """Domains take turns. Words of one length and domain are exchangeable: a word's frequency alone tells nothing."""
    per_domain = -(-wanted // len(by_domain))
    items = []
    for documents in by_domain.values():
        places = _places(documents, 4 * per_domain, context_size, rng)
        pools: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for document, match in places:
            pools[len(match[1])].append((document.id, match[1]))
        made: list[ChoiceItem] = []
        for document, match in places:
            if len(made) == per_domain:
                break
            context = document.text[max(0, match.start() - context_size) : match.start()]
            others = [word for identity, word in pools[len(match[1])] if identity != document.id]
            choices = _equally_dear(context, match[1], rng.sample(others, min(TRIED_DISTRACTORS, len(others))))
            if len(choices) == 4:
                made.append(_shuffled(f"cloze/{document.id[:16]}/{match.start()}", context, choices, rng))
        items.append(made)
    return [item for group in zip_longest(*items) for item in group if item is not None]


def _places(
    documents: list[Document], wanted: int, context_size: int, rng: random.Random
) -> list[tuple[Document, re.Match[str]]]:
    """Words of documents in random order, with at least half a context before each."""
    places: list[tuple[Document, re.Match[str]]] = []
    for document in rng.sample(documents, len(documents)):
        if len(places) >= wanted:
            break
        matches = [match for match in WORD.finditer(document.text) if match.start() >= context_size // 2]
        places += [(document, match) for match in rng.sample(matches, min(ITEMS_PER_DOCUMENT, len(matches)))]
    return places


def _equally_dear(context: str, word: str, others: list[str]) -> tuple[str, ...]:
    """" word" and up to three of `others` that each compressor needs as many bytes for after `context`."""
    costs = _costs(f"{context} {word}")
    kept = [word]
    for other in others:
        if len(kept) == 4:
            break
        if other not in kept and _costs_are(f"{context} {other}", costs):
            kept.append(other)
    return tuple(f" {choice}" for choice in kept)


# --- recall -------------------------------------------------------------------------------------------------------


def _recall(wanted: int, pairs: int, context_tokens: int, rng: random.Random) -> list[ChoiceItem]:
    """Distinct four-letter keys with distinct numbers, one pair a line; the query is one of the keys."""
    digits = len(str(10 * pairs))
    length = (pairs + 1) * len("\nabcd = ") + pairs * digits
    if length > context_tokens:
        raise DataError(
            f"evaluate.recall_pairs: {pairs} pairs take up to {length} tokens, evaluate.context_tokens is "
            f"{context_tokens}.\nLower recall_pairs or raise context_tokens."
        )
    items = []
    for number in range(wanted):
        keys: list[str] = []
        while len(keys) < pairs:
            key = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4))
            if key not in keys:
                keys.append(key)
        values = rng.sample(range(10 ** (digits - 1), 10**digits), pairs)
        answer = rng.randrange(pairs)
        lines = [f"{key} = {value}\n" for key, value in zip(keys, values, strict=True)]
        choices = tuple(f" {value}" for value in values)
        items.append(ChoiceItem(f"recall/{number}", "".join(lines) + f"{keys[answer]} =", choices, answer))
    return items


def _shuffled(identity: str, context: str, choices: tuple[str, ...], rng: random.Random) -> ChoiceItem:
    """An item whose true choice, the first of `choices`, stands anywhere."""
    order = rng.sample(range(len(choices)), len(choices))
    return ChoiceItem(identity, context, tuple(choices[index] for index in order), order.index(0))


# --- the control --------------------------------------------------------------------------------------------------


def deflate_size(data: bytes) -> int:
    """Bytes of raw DEFLATE at its strongest, without header or checksum."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return len(compressor.compress(data) + compressor.flush())


def lzma_size(data: bytes) -> int:
    """Bytes of raw LZMA at its strongest, without header or checksum."""
    options = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "dict_size": max(4096, len(data))}
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[options]))


COMPRESSORS = (deflate_size, lzma_size)


def _costs(text: str) -> list[int]:
    return [size(text.encode()) for size in COMPRESSORS]


def _costs_are(text: str, costs: list[int]) -> bool:
    """Whether each compressor needs `costs` bytes for `text`; the quick one is asked first."""
    return all(size(text.encode()) == cost for size, cost in zip(COMPRESSORS, costs, strict=True))


def control(items: EvaluationItems, window_bytes: int) -> dict[str, float]:
    """What no training reaches on `items`.

    A compressor's `bits_per_byte(_DOMAIN)_compressor` and `TASK_accuracy_control`; a guess's `TASK_accuracy_chance`.
    """
    metrics: dict[str, float] = {}
    bits, size = 0, 0
    for domain, documents in items.texts.items():
        texts = [item.text for item in documents]
        domain_bits, domain_size = compressor_bits(texts, window_bytes), sum(len(text.encode()) for text in texts)
        metrics[f"bits_per_byte_{domain}_compressor"] = domain_bits / domain_size
        bits, size = bits + domain_bits, size + domain_size
    metrics["bits_per_byte_compressor"] = bits / size
    for task, choices in items.tasks.items():
        metrics[f"{task}_accuracy_control"] = compressor_accuracy(choices)
        metrics[f"{task}_accuracy_chance"] = sum(1 / len(item.choices) for item in choices) / len(choices)
    return metrics


def compressor_bits(texts: Sequence[str], window_bytes: int) -> int:
    """Bits the better compressor needs for `texts`, each cut into windows that are compressed alone.

    `window_bytes` is what the model sees at once, so that both predict from the same context.
    """
    windows = [
        data[start : start + window_bytes]
        for data in (text.encode() for text in texts)
        for start in range(0, len(data), window_bytes)
    ]
    return min(8 * sum(size(window) for window in windows) for size in COMPRESSORS)


def compressor_accuracy(items: Sequence[ChoiceItem]) -> float:
    """Share of items where the true choice compresses best after its context; of k equal ones it gets 1/k.

    Of the two compressors the one that does better on these items.
    """
    return max(sum(_credit(item, size) for item in items) / len(items) for size in COMPRESSORS)


def _credit(item: ChoiceItem, size: Callable[[bytes], int]) -> float:
    costs = [size((item.context + choice).encode()) for choice in item.choices]
    return (costs[item.answer] == min(costs)) / costs.count(min(costs))
