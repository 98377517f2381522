"""Synthetic text: documents rephrased by a language model, as Nemotron-CC does (arXiv 2412.02595, section 2.3).

Low quality is written anew in encyclopaedia style; high quality also becomes questions and answers, a condensed
version, passages of knowledge and lists of facts (`curate.prompts`). `requests_for` and `postprocess` are pure;
`curate.chat` asks the model and remembers its answers. Off by default (`synthesis.enabled`).

How it goes into the corpus, once the cut has decided what is trained on and its labels:

    parents = (Parent(...) for each training document kept, of the domains in `language.domains`)
    synthesis = synthesize(parents, config.synthesis, seed, cache, progress)
    table = annotate(synthesis, annotated_shards, annotate_config, seed, scratch, pool)
    the cut over `table`, row i with the label and quality of synthesis.documents[i]: one more shard of train/

So synthetic text is normalised, masked and measured like any other; copies and near copies are looked for among
synthetic documents and in the whole corpus, which was there first; shared n-grams in held-out text and evaluation
sets; and the rules of the cut decide. The cache belongs outside the stage's scratch directory and its outputs, which
are removed when parameters change: answers cost money.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data_pipeline.annotate.decontaminate import Decontaminate
from data_pipeline.annotate.dedup.deduplicate import Deduplicate
from data_pipeline.annotate.features.features import Features
from data_pipeline.annotate.language import Language
from data_pipeline.annotate.mask import Mask
from data_pipeline.annotate.normalise import Normalise
from data_pipeline.annotate.passes import Passes
from data_pipeline.annotate.step import SCHEMA, GlobalStep, text_id, with_column, with_text
from data_pipeline.config import AnnotateConfig, Domain, Label, SynthesisConfig
from data_pipeline.curate.chat import Progress, Question, Reply, answer
from data_pipeline.curate.prompts import (
    BYTES_PER_TOKEN,
    DIVERSE_QA,
    EXTRACT_KNOWLEDGE,
    KNOWLEDGE_LIST,
    TASKS,
    TASKS_OF_LABEL,
    Task,
    tokens,
)
from data_pipeline.sources.readers import strings
from data_pipeline.storage import Surveys, write_arrays
from data_pipeline.workers.executor import Workers

QA_PER_150_TOKENS = 10          # question-answer pairs appended to a text, at most
CLOSING_QUOTE = {'"': '"', "“": "”", "«": "»", "'": "'"}
HALF_A_PAIR = re.compile("[\ud800-\udfff]")         # which JSON may spell and UTF-8 may not
QUESTION = re.compile(r"(?m)^[ \t]*(?:(?:[-*•]|\d+[.)])[ \t]*)?Question(?: \d+)?:")
BULLET = re.compile(r"\s*(?:[-*•–]|\d{1,3}[.)])\s+")
UNFINISHED = {"length": "cut off", "content_filter": "withheld by the endpoint"}


class Parent(NamedTuple):
    """A curated document to rephrase."""

    id: str
    text: str
    domain: str
    license: str
    quality: float
    label: Label


class Request(NamedTuple):
    """A piece of a document, for one task."""

    task: str
    text: str


class Drop(NamedTuple):
    """Why a reply gives no document."""

    reason: str


class Synthetic(NamedTuple):
    """A row of the curated Parquet, but for its id, and which part of it is new."""

    text: str
    written: str                # by the model: `text`, less the source that questions are appended to
    source: str                 # synthetic/TASK
    path: str                   # id of the parent
    domain: str
    license: str
    quality: float
    label: Label


def requests_for(document: Parent) -> list[Request]:
    """What to ask about `document`, by its label; nothing for medium quality and for text too short for its tasks.

    Lengths are estimated from bytes (`prompts.tokens`): the rephrasing model's tokenizer is not at hand.
    """
    return [
        Request(task.name, segment) for task in tasks_for(document) for segment in segments(document.text, task)
    ]


def tasks_for(document: Parent) -> list[Task]:
    """The tasks of the document's label that are for texts as long as this."""
    length = tokens(document.text)
    return [task for task in TASKS_OF_LABEL[document.label] if length >= task.shortest_document]


def segments(text: str, task: Task) -> Iterator[str]:
    """`text` in runs of whole lines, each as long as `task` can take; a longer line is left out (section 2.3)."""
    room = task.longest_segment * BYTES_PER_TOKEN
    runs: list[list[str]] = [[]]
    size = 0
    for line in text.split("\n"):
        length = len(line.encode()) + 1
        if size + length > room:
            runs.append([])
            size = 0
        if length <= room:
            runs[-1].append(line)
            size += length
    joined = ("\n".join(run).strip("\n") for run in runs)
    return (segment for segment in joined if tokens(segment) >= task.shortest_segment)


def postprocess(task: Task, source: str, reply: Reply) -> str | Drop:
    """The text that `reply` to a segment `source` gives, or why it gives none; `task.shortest_result` aside."""
    if reply.finish in UNFINISHED:
        return Drop(UNFINISHED[reply.finish])
    if HALF_A_PAIR.search(reply.text):
        return Drop("half a surrogate pair")
    text = plain(reply.text)
    if not text:
        return Drop("empty reply")
    if "<think>" in text or "</think>" in text:
        return Drop("thinking in the reply")
    if not text.startswith(task.opening):
        return Drop("opening line missing")
    text = unquoted(text.removeprefix(task.opening).strip())
    if task is DIVERSE_QA:
        return with_questions(source, text)
    if task is EXTRACT_KNOWLEDGE:
        text = re.sub(r"(?m)^Passage(?: \d+)?:[ \t]*\n?", "", text).strip()
    if task is KNOWLEDGE_LIST:
        return plain_list(text)
    return text or Drop("empty reply")


def plain(text: str) -> str:
    """`text` without the Markdown that models add to prose: bold, headings, rules."""
    text = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"\1", text)
    text = re.sub(r"(?m)^#{1,6}[ \t]+", "", text)
    return re.sub(r"(?m)^(?:---+|\*\*\*+)[ \t]*$\n?", "", text).strip()


def unquoted(text: str) -> str:
    """`text` without quotation marks around all of it."""
    closing = CLOSING_QUOTE.get(text[:1])
    enclosed = closing and len(text) > 1 and text.endswith(closing) and closing not in text[1:-1]
    return text[1:-1].strip() if enclosed else text


def with_questions(source: str, reply: str) -> str | Drop:
    """`source`, then some of the questions and answers in `reply`, shuffled; more where `source` is longer.

    Which ones follows from the two texts alone.
    """
    parts = (part.partition("Answer:") for part in QUESTION.split(reply)[1:])
    pairs = [f"Question: {asked.strip()}\nAnswer: {answered.strip()}"
             for asked, _, answered in parts if asked.strip() and answered.strip()]
    if not pairs:
        return Drop("no question with an answer")
    choice = random.Random(xxhash.xxh3_64_intdigest(f"{source}\0{reply}".encode()))
    choice.shuffle(pairs)
    most = max(1, QA_PER_150_TOKENS * tokens(source) // 150)
    return "\n\n".join([source, *pairs[: choice.randint(1, most)]])


def plain_list(reply: str) -> str | Drop:
    """The points of a list, one a line, without bullets, numbers or indents, and without what precedes the list."""
    lines = reply.split("\n")
    start = next((index for index, line in enumerate(lines) if BULLET.match(line)), None)
    if start is None:
        return Drop("no list")
    points = (BULLET.sub("", line, count=1).strip() for line in lines[start:])
    return "\n".join(point for point in points if point)


def select(documents: Iterable[Parent], megabytes: float, seed: int) -> list[Parent]:
    """Documents in an order drawn from `seed` and their ids, as many as fit into `megabytes` of text.

    The choice does not depend on the order in which they come, and no more than `megabytes` of them are held.
    Documents that no task wants, or that are larger than all there is room for, do not count.
    """
    room = int(megabytes * 1e6)
    ceiling = 1 << 64           # documents from this place on do not fit
    chosen: list[tuple[int, int, Parent]] = []      # a heap, the last place on top
    size = 0
    for document in documents:
        place = xxhash.xxh3_64_intdigest(document.id.encode(), seed)
        if place >= ceiling or not tasks_for(document):
            continue
        length = len(document.text.encode())
        if length <= room:
            heapq.heappush(chosen, (-place, length, document))
            size += length
        while size > room:
            last, length, _ = heapq.heappop(chosen)
            ceiling, size = -last, size - length
    return [document for *_, document in sorted(chosen, reverse=True)]


@dataclass(frozen=True)
class Synthesis:
    """What the model's replies came to."""

    documents: list[Synthetic]
    reasons: dict[Domain, Counter[str]]     # domain -> why a request gave no document -> requests
    requests: int
    cached: int                             # of them, answered by the cache
    failures: Counter[str]                  # why a request was not answered -> requests

    def table(self) -> pa.Table:
        """The documents as a shard of the annotate stage, in order."""
        columns: dict[str, list[Any]] = {name: [None] * len(self.documents) for name in SCHEMA.names}
        for name in ("text", "source", "path", "domain", "license"):
            columns[name] = [getattr(document, name) for document in self.documents]
        columns["id"] = [text_id(document.text) for document in self.documents]
        columns["held_out"] = [False] * len(self.documents)
        return pa.table(columns, SCHEMA)


def synthesize(
    documents: Iterable[Parent], config: SynthesisConfig, seed: int, cache: Path, progress: Progress
) -> Synthesis:
    """Rephrase `config.megabytes` of `documents`, chosen by `seed`; the result depends on nothing else but the replies.

    Replies are kept in the JSONL file `cache`, by model, task, wording of the prompt, input and sampling parameters:
    asking again costs nothing and needs no network. Requests that fail for good are counted and give no document.

    Raises DataError as `chat.answer` does: no key, an endpoint that refuses or does not answer.
    """
    parents = select(documents, config.megabytes, seed)
    asked = [(parent, request, question(request, config)) for parent in parents for request in requests_for(parent)]
    answers = answer([each for *_, each in asked], config, seed, cache, progress)
    found: list[Synthetic] = []
    reasons: dict[Domain, Counter[str]] = defaultdict(Counter)
    for parent, group in groupby(asked, key=itemgetter(0)):
        replies = [(request, answers.replies.get(each.key)) for _, request, each in group]
        for result in documents_of(parent, replies):
            if isinstance(result, Drop):
                reasons[parent.domain][result.reason] += 1
            else:
                found.append(result)
    return Synthesis(found, dict(reasons), len(asked), answers.cached, answers.failures)


def question(request: Request, config: SynthesisConfig) -> Question:
    """`request` as /chat/completions takes it."""
    task = TASKS[request.task]
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": task.longest_reply}
    about = {"model": config.model, "task": task.name, "prompt": task.version}
    identity = json.dumps([about, sampling, request.text], sort_keys=True)
    body = {"model": config.model, "messages": task.messages(request.text), **sampling}
    return Question(hashlib.sha256(identity.encode()).hexdigest(), body, about)


def documents_of(parent: Parent, replies: Iterable[tuple[Request, Reply | None]]) -> Iterator[Synthetic | Drop]:
    """What the replies to one document's requests, in their order, give; None stands for a request that failed."""
    for name, group in groupby(replies, key=lambda pair: pair[0].task):
        task = TASKS[name]
        results = [(request.text, postprocess(task, request.text, reply) if reply else Drop("request failed"))
                   for request, reply in group]
        yield from (result for _, result in results if isinstance(result, Drop))
        texts = [(source, result) for source, result in results if isinstance(result, str)]
        if task.joined and texts:
            texts = [("", "\n".join(text for _, text in texts))]
        for source, text in texts:
            if tokens(text) < task.shortest_result:
                yield Drop("too short")
                continue
            written = text.removeprefix(source).lstrip() if task is DIVERSE_QA else text
            yield Synthetic(text, written, f"synthetic/{name}", parent.id, parent.domain, parent.license,
                            parent.quality, parent.label)


def annotate(
    synthesis: Synthesis, shards: Sequence[Path], config: AnnotateConfig, seed: int, scratch: Path, pool: Workers
) -> pa.Table:
    """The synthetic documents as the annotate stage would have left them, in order, but for scores and `repeats`.

    A copy or near copy of any document in `shards`, the Parquet of the annotate stage, is a `duplicate`. Where
    questions follow their source, the questions alone are compared: the source is there on purpose. Repeated strings
    are not looked for, for the same reason. What `pool` notes of each shard stays in `scratch` for a run cut short.
    """
    table = synthesis.table()
    if not synthesis.documents:
        return table
    written = with_text(table, [document.written for document in synthesis.documents])
    for step in (Normalise(), Mask(config.mask), Language(), Features()):
        table, written = step.apply(table), step.apply(written)
    deduplicate, decontaminate = Deduplicate(config.minhash, seed), Decontaminate(config.decontamination, strings)
    copies = Surveys(scratch, f"earlier-{deduplicate.name}", len(shards) + 1)
    ngrams = Surveys(scratch, f"earlier-{decontaminate.name}", len(shards) + 1)
    jobs = [(number, shards[number]) for number in sorted({*copies.missing, *ngrams.missing} - {len(shards)})]
    survey = partial(_survey_shard, deduplicate, copies, decontaminate, ngrams)
    for _ in pool.all(survey, jobs, lambda job: f"survey of {job[1].name}"):
        pass
    reasons = _decided(deduplicate, written, copies, pool)["duplicate"]
    reasons = pc.replace_substring(reasons, "held-out", "corpus").combine_chunks()
    return with_column(_decided(decontaminate, table, ngrams, pool), "duplicate", reasons)


def _survey_shard(
    deduplicate: Deduplicate, copies: Surveys, decontaminate: Decontaminate, ngrams: Surveys, job: tuple[int, Path]
) -> None:
    """In a worker. Of two copies a held-out one stays: that is what the corpus is to the synthetic documents."""
    number, shard = job
    table = pq.read_table(shard, schema=SCHEMA).combine_chunks()
    write_arrays(decontaminate.survey(table), ngrams.file(number))
    earlier = with_column(table, "held_out", [True] * table.num_rows)
    write_arrays(deduplicate.survey(earlier), copies.file(number))


def _decided(step: GlobalStep, table: pa.Table, surveys: Surveys, pool: Workers) -> pa.Table:
    """`table` as the shard after all others."""
    write_arrays(step.survey(table), surveys.file(len(surveys) - 1))
    directory = surveys.directory / f"decide-{step.name}"
    shutil.rmtree(directory, ignore_errors=True)        # replies may be others than before
    decision = step.decide(surveys, Passes(directory, pool))
    table = step.apply(table, decision.shared, decision.shards[-1])
    shutil.rmtree(directory)
    return table
