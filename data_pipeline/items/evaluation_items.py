"""Evaluation items from held-out text, by a seeded function, none of which shares an n-gram with training text.

Each kind is one that a model of a few million parameters can say something about after minutes of training:

- bits per byte: held-out documents of each domain;
- `syntax_pairs`, of the domain `code`: a line of real Python against the same line made ungrammatical, after the lines
  before it;
- `recall`: `key = value` lines, then a key again: which of the values? (associative recall in context)
- `copy_at_Nx`, `recall_at_Nx`, `needle_at_Nx`: what stood in a context of N training lengths (`context_items`)

A score means little without what no training at all reaches. `control` gives that: the best of DEFLATE, LZMA and the
tokenizer, whose fewest tokens a model with random weights prefers. Without care these solve such a task: naive syntax
pairs gave a compressor 0.96, the tokenizer still 0.8 where compressors were at chance, and token frequencies 0.8 where
all three were. So their wrong lines take as many bytes by either compressor, and as many tokens, as the true ones, and
each fault has an opposite in another pair, so that no sum over tokens prefers the true lines.
Where the answer stood in the context they are left as they are: finding a repeated key is exactly what a compressor
does; its score says that no knowledge is needed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.config import DataError
from data_pipeline.curated import batches, manifest, shards
from data_pipeline.items import context_items
from data_pipeline.items.context_items import Asked, CountTokens
from data_pipeline.items.syntax_pairs import faulty_lines
from data_pipeline.text.ngrams import hash_set, is_in, ngrams_in, readings
from data_pipeline.text.words import passages_of

OVERSUPPLY = 2                  # items made for each one wanted: some are refused
DOCUMENTS_PER_DOMAIN = 12       # at least, so that the standard error over documents means something
PAIRS_PER_DOCUMENT = 12         # of a true and a wrong line; not all find their opposite
Measure = Callable[[str], int]
Encode = Callable[[str], Sequence[Hashable]]            # tokens of a text
Change = tuple[frozenset[tuple[Hashable, int]], ...]    # tokens that go and tokens that come, how often each


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

    @property
    def rows(self) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
        """Texts and tasks as plain values."""
        return ({domain: [asdict(item) for item in items] for domain, items in self.texts.items()},
                {task: [asdict(item) for item in items] for task, items in self.tasks.items()})

    def part(self, share: float) -> EvaluationItems:
        """The first items of every domain and task, at least two: they stand in no order of any meaning. Not of those
        whose length is measured in the training length of our models."""
        def first(items: list[Any]) -> list[Any]:
            return items[: max(2, round(share * len(items)))]

        return EvaluationItems({domain: first(items) for domain, items in self.texts.items()},
                               {task: first(items) for task, items in self.tasks.items() if "_at_" not in task},
                               self.refused)

    def digest(self) -> str:
        """SHA-256 over every item in order: equal digests mean that two models were asked the same."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class HeldOutDocument:
    """A held-out document that items are made of."""

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
    context_multiples: Sequence[int],
    items_per_context: int,
    encode: Encode,
    seed: int,
) -> EvaluationItems:
    """Items from `curated/heldout`, checked against `curated/train`.

    Contexts are kept to two characters a token of `context_tokens`, so that they are not cut off; those of
    `context_items` are as long as a multiple of `context_tokens` by `encode`. A task has fewer than
    `items_per_task` items where the held-out text yields no more.

    Raises DataError where a domain or task gets no item at all, or a recall item cannot fit the context.
    """
    ngram, heldout = manifest(curated, "decontamination_ngram", "heldout")
    documents = [HeldOutDocument(**row) for batch in _batches(curated, "heldout", ["id", "domain", "text"])
                 for row in batch.to_pylist()]
    by_domain = {domain: [document for document in documents if document.domain == domain] for domain in heldout}
    wanted, costs = OVERSUPPLY * items_per_task, TextCosts(encode)
    domain_bytes = 1000 * bits_per_byte_kilobytes
    texts = {
        domain: _texts(members, domain_bytes, random.Random(f"{seed}:texts:{domain}"))
        for domain, members in by_domain.items()
    }
    tasks = {}
    if "code" in by_domain:
        tasks["syntax_pairs"] = _syntax_pairs(
            by_domain["code"], wanted, context_tokens, costs, random.Random(f"{seed}:syntax_pairs"))
    tasks["recall"] = _recall(wanted, recall_pairs, context_tokens, random.Random(f"{seed}:recall"))
    sizes = dict.fromkeys(tasks, items_per_task)
    for multiple in context_multiples:
        for task, asked in _context_tasks(documents, multiple * context_tokens, costs.tokens, f"{seed}:{multiple}"):
            name = f"{task}_at_{multiple}x"
            tasks[name] = [ChoiceItem(f"{name}/{number}", *item) for number, item in
                           enumerate(islice(asked, OVERSUPPLY * items_per_context))]
            sizes[name] = items_per_context
    candidates = [item.text for items in texts.values() for item in items]
    candidates += [item.context + item.choices[item.answer] for items in tasks.values() for item in items]
    seen = set(_seen_in_training(candidates, curated, ngram))
    texts = {
        domain: _up_to_bytes([item for item in items if item.text not in seen], domain_bytes)
        for domain, items in texts.items()
    }
    tasks = {
        task: [item for item in items if item.context + item.choices[item.answer] not in seen][: sizes[task]]
        for task, items in tasks.items()
    }
    for name, items in [*texts.items(), *tasks.items()]:
        if not items:
            raise DataError(
                f"{curated}/heldout: no item for `{name}` could be made of the held-out text.\n"
                "Give `annotate.sources` more text, or raise `annotate.held_out.fraction`."
            )
    return EvaluationItems(texts, tasks, refused=sum(text in seen for text in candidates))


def write(path: Path, items: EvaluationItems, controls: Mapping[str, float]) -> None:
    """One JSON file with every item and what no training reaches on them."""
    path.write_text(json.dumps({"controls": controls, **asdict(items)}, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[EvaluationItems, dict[str, float]]:
    """What `write` wrote. Raises DataError."""
    try:
        content = json.loads(path.read_text())
        texts = {domain: [TextItem(**row) for row in rows] for domain, rows in content["texts"].items()}
        tasks = {
            task: [ChoiceItem(row["id"], row["context"], tuple(row["choices"]), row["answer"]) for row in rows]
            for task, rows in content["tasks"].items()
        }
        return EvaluationItems(texts, tasks, content["refused"]), content["controls"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not evaluation items ({error!r}).\nRun the stage `items` again.") from None


# --- reading ------------------------------------------------------------------------------------------------------


def _batches(curated: Path, split: str, columns: list[str]) -> Iterator[pa.Table]:
    return (batch for shard in shards(curated, split) for batch in batches(shard, columns))


def _seen_in_training(texts: Sequence[str], curated: Path, n: int) -> list[str]:
    """Those of `texts` that share an n-gram of words with a training document."""
    ours = readings(pa.table({"text": pa.array(texts, pa.string())}))
    known, shared = hash_set(np.concatenate([ngrams_in(words, n) for words in ours])), [np.empty(0, np.uint64)]
    for batch in _batches(curated, "train", ["text"]):
        for words in readings(batch):
            there = ngrams_in(words, n)
            shared.append(there[is_in(there, known)])
    found, seen = hash_set(np.concatenate(shared)), np.zeros(len(texts), np.int64)
    for words in ours:
        passages = passages_of(words, n)
        hits = np.flatnonzero(is_in(passages, found) & (passages != 0))
        seen += np.bincount(np.searchsorted(words.first, hits, "right") - 1, minlength=len(texts))
    return [text for text, hits in zip(texts, seen.tolist(), strict=True) if hits]


# --- bits per byte ------------------------------------------------------------------------------------------------


def _texts(documents: list[HeldOutDocument], domain_bytes: int, rng: random.Random) -> list[TextItem]:
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


def _syntax_pairs(
    documents: list[HeldOutDocument], wanted: int, context_size: int, costs: TextCosts, rng: random.Random
) -> list[ChoiceItem]:
    """A true line and the same line with a fault, after the lines before it.

    The fault is decided by what stands before and on the line: with it, no continuation is Python. Pairs come by two:
    one fault takes away the tokens that the other brings, and brings those that it takes away. So a sum over tokens, of
    log frequencies or of bytes, prefers the true line in one of the two or in neither. At most in about half of the
    pairs the fault is another order of the same tokens, its own opposite.
    """
    items: list[ChoiceItem] = []
    waiting: dict[Change, ChoiceItem] = {}              # for the opposite change
    couples: Counter[bool] = Counter()                  # by whether the tokens are the same
    used: Counter[str] = Counter()
    for document in rng.sample(documents, len(documents)):
        if len(items) >= wanted:
            break
        lines = document.text.split("\n")

        @cache
        def before(row: int, lines: list[str] = lines) -> str:
            return _last_lines(lines[:row], context_size)

        def admissible(row: int, wrong: str, lines: list[str] = lines, before: Callable[[int], str] = before) -> bool:
            context = before(row)
            true, false = context + lines[row] + "\n", context + wrong + "\n"
            if len(context.strip()) < context_size // 4 or not costs.equal(true, false):
                return False
            change = costs.change(true, false)
            return couples[True] <= couples[False] if change == change[::-1] else change not in waiting

        for row, wrong in islice(faulty_lines(document.text, used, rng, admissible), PAIRS_PER_DOCUMENT):
            context = before(row)
            identity = f"syntax_pairs/{document.id[:16]}/{row + 1}"
            item = _shuffled(identity, context, (lines[row] + "\n", wrong + "\n"), rng)
            change = costs.change(context + lines[row] + "\n", context + wrong + "\n")
            if opposite := waiting.pop(change[::-1], None):
                items += [opposite, item]
                couples[change == change[::-1]] += 1
            else:
                waiting[change] = item
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
        keys = context_items.draw_keys(pairs, rng)
        values = rng.sample(range(10 ** (digits - 1), 10**digits), pairs)
        answer = rng.randrange(pairs)
        lines = [f"{key} = {value}\n" for key, value in zip(keys, values, strict=True)]
        choices = tuple(f" {value}" for value in values)
        items.append(ChoiceItem(f"recall/{number}", "".join(lines) + f"{keys[answer]} =", choices, answer))
    return items


def _context_tasks(
    documents: list[HeldOutDocument], length: int, count_tokens: CountTokens, seed: str
) -> list[tuple[str, Iterator[Asked]]]:
    """The tasks of `context_items` at `length` tokens."""
    texts = [document.text for document in documents]
    return [
        ("copy", context_items.copies(length, count_tokens, random.Random(f"{seed}:copy"))),
        ("recall", context_items.recalls(length, count_tokens, random.Random(f"{seed}:recall"))),
        ("needle", context_items.needles(texts, length, count_tokens, random.Random(f"{seed}:needle"))),
    ]


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


class TextCosts:
    """What a text costs without any training of a model: bytes by either compressor, and tokens."""

    def __init__(self, encode: Encode):
        # A true line is compared with many wrong ones: what it costs is known already.
        self.encode = lru_cache(4)(encode)
        self.measures: tuple[Measure, ...] = (
            lru_cache(4)(lambda text: deflate_size(text.encode())), self.tokens,
            lru_cache(4)(lambda text: lzma_size(text.encode())),
        )

    def tokens(self, text: str) -> int:
        """How many tokens `text` has."""
        return len(self.encode(text))

    def equal(self, text: str, other: str) -> bool:
        """Whether the two cost the same by each measure; the quickest is asked first."""
        return all(measure(text) == measure(other) for measure in self.measures)

    def change(self, text: str, other: str) -> Change:
        """Tokens of `text` alone, and of `other` alone; neither where the same ones stand in another order."""
        ours, theirs = self.encode(text), self.encode(other)
        same = next((place for place, (one, its) in enumerate(zip(ours, theirs, strict=False)) if one != its), 0)
        go, come = Counter(ours[same:]), Counter(theirs[same:])
        return frozenset((go - come).items()), frozenset((come - go).items())


def control(items: EvaluationItems, window_bytes: int, encode: Encode) -> dict[str, float]:
    """What no training reaches on `items`.

    A compressor's `bits_per_byte(_DOMAIN)_compressor`; `TASK_accuracy_control`, the best of the compressors and of
    taking the fewest tokens; a guess's `TASK_accuracy_chance`.
    """
    sizes = TextCosts(encode).measures
    metrics: dict[str, float] = {}
    bits, size = 0, 0
    for domain, documents in items.texts.items():
        texts = [item.text for item in documents]
        domain_bits, domain_size = compressor_bits(texts, window_bytes), sum(len(text.encode()) for text in texts)
        metrics[f"bits_per_byte_{domain}_compressor"] = domain_bits / domain_size
        bits, size = bits + domain_bits, size + domain_size
    metrics["bits_per_byte_compressor"] = bits / size
    for task, choices in items.tasks.items():
        metrics[f"{task}_accuracy_control"] = cheapest_accuracy(choices, sizes)
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


def cheapest_accuracy(items: Sequence[ChoiceItem], measures: Sequence[Measure]) -> float:
    """Share of items where the true choice costs least after its context; of k equal ones it gets 1/k.

    Of the measures the one that does best on these items.
    """
    return max(sum(_credit(item, measure) for item in items) / len(items) for measure in measures)


def _credit(item: ChoiceItem, measure: Measure) -> float:
    costs = [measure(item.context + choice) for choice in item.choices]
    return (costs[item.answer] == min(costs)) / costs.count(min(costs))
