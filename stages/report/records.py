"""The small records under runs/PROFILE/, read when they are asked for and checked against the classes that wrote them.

What cannot be read is a RecordError wherever it is asked for; the rest is there.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from data_pipeline.config import DataError, Label
from data_pipeline.schema import Blend, Dropped, FunnelStep, Histogram, PassedOverCount, Refused
from model.benchmark.schema import DecodeRepeat, DecodeRow
from model.compression.schema import CandidateRecord, Controls, Costs, Importance
from model.evaluation.schema import PaperScore, PaperTask, Samples, Scores
from stages.frame.params import Params
from stages.frame.schema import DistillationRow, Provenance, ValidationRow
from stages.report.study_schema import FOLDER, Study

LABELS: tuple[Label, ...] = get_args(Label)         # of quality, the best first
STAGES = ("annotate", "curate", "tokenizer", "tokenize", "pretrain", "compress", "export", "items", "evaluate",
          "reference", "benchmark")                              # in the graph's order
FOREACH = ("pretrain", "export", "evaluate")        # those with a member a model
Curve = dict[float, float]                          # by tokens
Pair = tuple[str, str]                              # models: candidate, reference
T = TypeVar("T")
CURE = "Make it again by the study's command, or restore the committed file."


class RecordError(DataError):
    """A record that is missing, empty, malformed or of another version: two lines, what of which file, what to do."""


def make_again(path: Path) -> str:
    """What to do about a file STAGE/NAME or STAGE/MEMBER/NAME."""
    folder = path.parent
    stage = f"{folder.parent.name}@{folder.name}" if folder.parent.name in FOREACH else folder.name
    return f"Run `dvc repro --force --single-item {stage}` to write it again."


class Metrics(dict[str, float]):
    """The numbers of one metrics.json; texts in it, such as digests, are left out."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        super().__init__({key: value for key, value in values.items() if type(value) in (int, float)})

    def __missing__(self, key: str) -> float:
        raise RecordError(f"{self.path}: `{key}` is missing or not a number.\n{make_again(self.path)}")


class Reader:
    """Files below `root`, each read once.

    Attributes:
        cure: what to do about a path that cannot be read.
        files: what was read, by path.
        faults: what was asked for and cannot be read.
    """

    def __init__(self, root: Path, cure: Callable[[Path], str] = make_again):
        self.root, self.cure = root, cure
        self.files: dict[Path, Any] = {}
        self.faults: list[str] = []

    def fault(self, words: str, *parts: str) -> RecordError:
        """The error, noted in `faults`, that says this of the file."""
        path = self.root.joinpath(*parts)
        self.faults.append(f"{path}: {words}.\n{self.cure(path)}")
        return RecordError(self.faults[-1])

    def read(self, kind: type[T], *parts: str, empty: bool = False) -> T:
        """The file as a value of the type `kind`; a CSV file with a header is a list of its rows, in which an empty
        cell is None. Raises RecordError, also for a value that holds nothing unless it may be `empty`."""
        path = self.root.joinpath(*parts)
        try:
            if path not in self.files:
                text = path.read_text()
                content = json.loads(text) if path.suffix == ".json" else [
                    {key: value or None for key, value in row.items()} for row in csv.DictReader(text.splitlines())]
                if content and path.suffix == ".csv" and not text.endswith("\n"):
                    raise ValueError("its last line is cut")
                self.files[path] = TypeAdapter(kind).validate_python(content)
            found: T = self.files[path]
            if found or empty:
                return found
            fault = "holds nothing" if path.suffix == ".json" else "no rows"
        except ValidationError as error:
            fault = _first_fault(error)
        except OSError as error:
            fault = "not found" if isinstance(error, FileNotFoundError) else str(error.strerror)
        except UnicodeDecodeError as error:
            fault = f"not UTF-8 ({error.reason})"
        except RecursionError:
            fault = "nested too deeply to be read"
        except ValueError as error:
            fault = f"not valid {path.suffix[1:].upper()} ({error})" if text.strip() else "empty"
        raise self.fault(fault, *parts)

    def metrics(self, *parts: str) -> Metrics:
        """metrics.json in this folder."""
        return Metrics(self.root.joinpath(*parts, "metrics.json"), self.read(dict[str, Any], *parts, "metrics.json"))


def _first_fault(error: ValidationError) -> str:
    """What is wrong with the first field that is, and how many more are."""
    first, *rest = error.errors()
    field, words = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    fault = {"missing": "is missing", "extra_forbidden": "is unknown"}.get(first["type"], f"({words})")
    fault = f"`{field}` {fault}" if field else words
    return fault + (f", and {len(rest)} more faults" if rest else "") + "; of another version"


def _record(kind: Any, *parts: str, empty: bool = False) -> Any:
    """An attribute that is the file's content as a value of the type `kind`."""
    return property(lambda self: self.reader.read(kind, *parts, empty=empty))


def _by(name: str, rows: list[T]) -> dict[Any, list[T]]:
    """Rows by the value of one of their fields, in order of first appearance."""
    return {key: [row for row in rows if getattr(row, name) == key]
            for key in dict.fromkeys(getattr(row, name) for row in rows)}


class DataRecords:
    """Records of the data stages under `root`. Attributes raise RecordError."""

    refused: dict[str, dict[str, Refused]] = _record(
        dict[str, dict[str, Refused]], "annotate", "refused.json", empty=True)
    passed_over: dict[str, dict[str, PassedOverCount]] = _record(
        dict[str, dict[str, PassedOverCount]], "annotate", "passed_over.json", empty=True)
    funnel: list[FunnelStep] = _record(list[FunnelStep], "curate", "funnel.json")
    histograms: dict[str, dict[str, Histogram]] = _record(dict[str, dict[str, Histogram]], "curate", "histograms.json")
    dropped: dict[str, dict[str, Dropped]] = _record(
        dict[str, dict[str, Dropped]], "curate", "dropped.json", empty=True)
    blend: Blend = _record(Blend, "tokenize", "blend.json")

    def __init__(self, root: Path):
        self.reader = Reader(root)

    @property
    def steps(self) -> dict[str, list[FunnelStep]]:
        """By domain."""
        return _by("domain", self.funnel)

    @property
    def shared(self) -> dict[str, dict[str, int]]:
        """Training documents that went for words they share, by evaluation set and domain."""
        found: dict[str, dict[str, int]] = {}
        for row in (row for row in self.funnel if row.step == "decontaminate"):
            for reason, count in row.reasons.items():
                found.setdefault(reason.partition(" in a row with ")[2], {})[row.domain] = count
        return dict(sorted(found.items()))

    def reasons(self, domain: str) -> Counter[str]:
        """Documents that went, by reason, in all steps."""
        return sum((Counter(row.reasons) for row in self.steps[domain]), Counter())


class Records(DataRecords):
    """Every record of one profile, each read when it is asked for. Attributes and methods raise RecordError.

    Attributes:
        runs: STAGE or STAGE@MEMBER, in the graph's order.
    """

    candidates: list[CandidateRecord] = _record(list[CandidateRecord], "compress", "candidates.json")
    controls: Controls = _record(Controls, "compress", "controls.json")
    costs: Costs = _record(Costs, "compress", "costs.json")
    importance: Importance = _record(Importance, "compress", "importance.json")

    def __init__(self, params: Params, root: Path):
        super().__init__(root)
        self.params = params
        members = dict(zip(FOREACH, (list(params.variants), params.models, params.models), strict=True))
        self.runs = [f"{stage}@{member}".strip("@") for stage in STAGES for member in members.get(stage, [""])]

    def metrics(self, stage: str, member: str = "") -> Metrics:
        """The metrics of a stage. Raises RecordError, also for a model that params.yaml does not list."""
        if member and f"{stage}@{member}" not in self.runs:
            raise RecordError(f"params.yaml: `models` lacks {member}, which the report compares.\nAdd it.")
        return self.reader.metrics(stage, member)

    def provenance(self, run: str) -> Provenance:
        """Of one of `runs`."""
        return self.reader.read(Provenance, *run.split("@"), "provenance.json")

    def scores(self, model: str) -> Scores:
        """scores.json of a model."""
        return self.reader.read(Scores, "evaluate", model, "scores.json")

    def items_digest(self, model: str) -> str:
        """Of what a model was asked. Raises RecordError where its record does not say."""
        file = ("evaluate", model, "metrics.json")
        if digest := self.reader.read(dict[str, Any], *file).get("items_digest"):
            return str(digest)
        raise self.reader.fault("no `items_digest`", *file)

    def samples(self, model: str) -> Samples:
        """samples.json of a model."""
        return self.reader.read(Samples, "evaluate", model, "samples.json")

    def paper_tasks(self, model: str) -> list[PaperScore]:
        """paper_tasks.json of a model."""
        return self.reader.read(list[PaperScore], "evaluate", model, "paper_tasks.json")

    @property
    def paper_asked(self) -> list[PaperScore]:
        """Of every task that some model was asked, the first such model's result."""
        first: dict[str, PaperScore] = {}
        for model in self.params.models:
            first = {of.task.task: of for of in self.paper_tasks(model)} | first
        return list(first.values())

    def paper_score(self, model: str, task: PaperTask) -> PaperScore:
        """A model's result at a task."""
        for of in self.paper_tasks(model):
            if of.task == task:
                return of
        raise self.reader.fault(f"no {task.name} as other models were asked it", "evaluate", model, "paper_tasks.json")

    @property
    def chosen(self) -> CandidateRecord:
        """The candidate that was distilled at length."""
        for candidate in self.candidates:
            if candidate.chosen:
                return candidate
        raise self.reader.fault("no candidate is chosen", "compress", "candidates.json")

    @property
    def reference(self) -> dict[str, Any]:
        """Metrics of the stage `reference`; `left_out` where the model was not asked."""
        return self.reader.read(dict[str, Any], "reference", "metrics.json")

    @property
    def reference_tasks(self) -> list[PaperScore]:
        """Its paper_tasks.json; none where it was not asked."""
        asked = not self.reference.get("left_out")
        return self.reader.read(list[PaperScore], "reference", "paper_tasks.json") if asked else []

    def validation(self, variant: str) -> Curve:
        """Bits per byte over all domains."""
        rows = self.reader.read(list[ValidationRow], "pretrain", variant, "validation.csv")
        curve: Curve = {row.tokens: row.bits_per_byte for row in rows if row.domain == "all"}
        return self._whole(curve, self.metrics("pretrain", variant)["tokens"], "pretrain", variant, "validation.csv")

    @property
    def distillation(self) -> dict[str, Curve]:
        """compressed, random: KL to the parent"""
        rows = self.reader.read(list[DistillationRow], "compress", "distillation.csv")
        tokens = self.metrics("compress")["distillation_tokens"]
        return {model: self._whole({row.tokens: row.kl for row in rows if row.model == model}, tokens,
                                   "compress", "distillation.csv") for model in ("compressed", "random")}

    def _whole(self, curve: Curve, tokens: float, *parts: str) -> Curve:
        """The curve of this file, which must end at `tokens`."""
        if (last := max(curve, default=0)) != tokens:
            raise self.reader.fault(f"cut off: ends at {last:,} of {tokens:,.0f} tokens", *parts)
        return curve

    @property
    def decode(self) -> dict[str, list[DecodeRow]]:
        """hybrid, transformer, compressed, by rising context"""
        return _by("model", sorted(self._timed(DecodeRow, "decode.csv", 1), key=lambda row: row.context))

    @property
    def decode_repeats(self) -> dict[str, dict[int, list[float]]]:
        """Seconds a token by model and context, repeat by repeat, in each of which every model had its turn."""
        rows = self._timed(DecodeRepeat, "decode_repeats.csv", self.params.benchmark.repeats)
        return {model: {context: [row.seconds_per_token for row in repeats]
                        for context, repeats in _by("context", of).items()} for model, of in _by("model", rows).items()}

    def _timed(self, kind: Any, name: str, times: int) -> list[Any]:
        """Rows of this file: `times` of every model at every context."""
        rows = self.reader.read(list[kind], "benchmark", name)
        counted = Counter((row.model, row.context) for row in rows)
        for model, context in product(("hybrid", "transformer", "compressed"), self.params.benchmark.contexts):
            if (count := counted[model, context]) != times:
                raise self.reader.fault(f"{count} of {times} rows for model {model} at {context:,} tokens", "benchmark",
                                        name)
        return rows


def pairs(params: Params, candidate: Sequence[str], reference: Sequence[str]) -> list[Pair]:
    """Models of one seed, which see the same text in the same order.

    Each side: architecture, precision and, for a control arm, FP8 recipe, else current scaling; or one model, "parent"
    for that of compress.
    """
    def by_seed(of: Sequence[str]) -> dict[int, str]:
        if len(of) == 1:
            return {0: params.compress.parent if of[0] == "parent" else of[0]}
        return {variant.seed: name for name, variant in params.variants.items() if (*of, "current")[:3] == (
            variant.architecture, variant.precision,
            variant.fp8_recipe or (params.pretrain.fp8_recipe if variant.precision == "fp8" else "current"))}

    ours, theirs = by_seed(candidate), by_seed(reference)
    return [(name, theirs[seed]) for seed, name in ours.items() if seed in theirs]


def read_study(path: Path) -> Study:
    """Raises RecordError."""
    study = Reader(path.parent, lambda _: CURE).read(Study, path.name)
    if study.study != path.stem:
        raise RecordError(f"{path}: holds the study `{study.study}`, not the one of its name.\n{CURE}")
    return study


def load_studies(folder: Path = FOLDER) -> dict[str, Study | RecordError]:
    """Every record by its file's name; one that cannot be used is the error that says why."""
    found: dict[str, Study | RecordError] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = read_study(path)
        except RecordError as error:
            found[path.stem] = error
    return found
