"""The small records under runs/PROFILE/, read when they are asked for and checked against the classes that wrote them.

What cannot be read is a RecordError wherever it is asked for; the rest is there.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from data_pipeline.config import DataError, Label
from data_pipeline.schema import Blend, Dropped, FunnelStep, Histogram, TokenFile
from model.compression.schema import Candidate, Controls, Costs, Importance, LayerImportance
from model.evaluation_schema import PaperScore, Samples, Scores
from stages.params import Params
from stages.schema import DecodeRepeat, DecodeRow, DistillationRow, Provenance, TrainingRow, ValidationRow

LABELS: tuple[Label, ...] = get_args(Label)         # of quality, the best first
FOREACH = ("pretrain", "export", "evaluate")        # stages with a member a model
Curve = dict[str, list[float]]                      # columns of equal length
T = TypeVar("T")


class RecordError(DataError):
    """A record that is missing, empty, malformed or of another version: two lines, what of which file, what to do."""


class Metrics(dict[str, float]):
    """The numbers of one metrics.json; texts in it, such as digests, are left out."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        super().__init__({key: value for key, value in values.items()
                          if isinstance(value, int | float) and not isinstance(value, bool)})

    def __missing__(self, key: str) -> float:
        raise record_error(self.path, f"`{key}` is missing or not a number")


def record_error(path: Path, what: str) -> RecordError:
    """Of a file STAGE/NAME or STAGE/VARIANT/NAME."""
    folder = path.parent
    stage = f"{folder.parent.name}@{folder.name}" if folder.parent.name in FOREACH else folder.name
    return RecordError(f"{path}: {what}.\nRun `dvc repro --force --single-item {stage}` to write it again.")


class Reader:
    """Files below `root`, each read once.

    Attributes:
        files: paths that were read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.files: list[Path] = []
        self._known: dict[Path, Any] = {}

    @property
    def faults(self) -> list[str]:
        """What was asked for and cannot be read."""
        return [str(content) for content in self._known.values() if isinstance(content, RecordError)]

    def json(self, kind: type[T], *parts: str) -> T:
        """The file as a value of the type `kind`. Raises RecordError."""
        return self._once(parts, lambda path, text: TypeAdapter(kind).validate_python(json.loads(text)))

    def metrics(self, *parts: str) -> Metrics:
        """metrics.json in this folder."""
        return Metrics(self.root.joinpath(*parts, "metrics.json"), self.json(dict[str, Any], *parts, "metrics.json"))

    def rows(self, kind: type[T], *parts: str) -> list[T]:
        """The rows of a CSV file with a header, of the pydantic class `kind`; an empty cell is None."""
        def parse(path: Path, text: str) -> list[T]:
            rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(text.splitlines())]
            if not rows:
                raise record_error(path, "no rows")
            return TypeAdapter(list[kind]).validate_python(rows)            # type: ignore[valid-type]

        return self._once(parts, parse)

    def _once(self, parts: tuple[str, ...], parse: Callable[[Path, str], T]) -> T:
        path = self.root.joinpath(*parts)
        if path not in self._known:
            self._known[path] = self._read(path, parse)
        if isinstance(self._known[path], RecordError):
            raise self._known[path]
        found: T = self._known[path]
        return found

    def _read(self, path: Path, parse: Callable[[Path, str], Any]) -> Any:
        try:
            text = path.read_text()
            self.files.append(path)
            return parse(path, text) if text.strip() else record_error(path, "empty")
        except RecordError as error:
            return error
        except ValidationError as error:
            return record_error(path, _first_fault(error))
        except OSError as error:
            return record_error(path, "not found" if isinstance(error, FileNotFoundError) else str(error.strerror))
        except ValueError as error:
            return record_error(path, f"not valid JSON ({error})")


def _first_fault(error: ValidationError) -> str:
    """What is wrong with the first field that is, and how many more are."""
    first, *rest = error.errors()
    field = ".".join(map(str, first["loc"])) or "the whole"
    fault = {"missing": "is missing", "extra_forbidden": "is unknown"}.get(first["type"], f"({first['msg']})")
    return f"`{field}` {fault}" + (f", and {len(rest)} more faults" if rest else "") + "; of another version"


class Lazy(Mapping[str, T]):
    """Values by name, each read when it is asked for."""

    def __init__(self, names: list[str], read: Callable[[str], T]):
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _record(kind: Any, *parts: str) -> Any:
    """An attribute that is the file's content as a value of the type `kind`."""
    return property(lambda self: self.reader.json(kind, *parts))


class DataRecords:
    """Records of the data stages. `blend` is None where nothing was tokenized."""

    funnel: list[FunnelStep] = _record(list[FunnelStep], "curate", "funnel.json")
    dropped: dict[str, dict[str, Dropped]] = _record(dict[str, dict[str, Dropped]], "curate", "dropped.json")

    def __init__(self, reader: Reader, tokenized: bool = True):
        self.reader, self.tokenized = reader, tokenized

    @property
    def histograms(self) -> list[tuple[str, str, Histogram]]:
        """(measure, domain, histogram)"""
        found = self.reader.json(dict[str, dict[str, Histogram]], "curate", "histograms.json")
        return [(measure, domain, item) for measure, domains in found.items() for domain, item in domains.items()]

    @property
    def blend(self) -> Blend | None:
        return self.reader.json(Blend, "tokenize", "blend.json") if self.tokenized else None

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(row.domain for row in self.funnel))

    def steps(self, domain: str) -> list[FunnelStep]:
        return [row for row in self.funnel if row.domain == domain]

    def reasons(self, domain: str) -> Counter[str]:
        """Documents that went, by reason, in all steps."""
        return sum((Counter(row.reasons) for row in self.steps(domain)), Counter())

    def files(self, domain: str) -> dict[Label, TokenFile]:
        """The files of training tokens of a domain by label, the best first; none before tokenizing."""
        files = self.blend.files if self.blend else {}
        return {label: files[name] for label in LABELS if (name := f"train/{domain}-{label}") in files}


class Records:
    """Every record of one profile, each read when it is asked for. Dictionaries by model or variant stand in the order
    of params.yaml. Attributes raise RecordError."""

    def __init__(self, params: Params, root: Path):
        self.params, self.reader = params, Reader(root)
        self.data = DataRecords(self.reader)
        stages = ("annotate", "curate", "tokenizer", "tokenize", "pretrain", "compress", "export", "items", "evaluate",
                  "benchmark")
        variants, models = list(params.variants), params.models
        members = dict(zip(FOREACH, (variants, models, models), strict=True))
        self.runs = ["@".join((stage, member) if member else (stage,))       # in the graph's order
                     for stage in stages for member in members.get(stage, [""])]
        self.training: Mapping[str, Curve] = Lazy(
            variants, lambda name: _columns(self.reader.rows(TrainingRow, "pretrain", name, "training.csv")))
        self.validation: Mapping[str, dict[str, Curve]] = Lazy(                                # and by domain
            variants, lambda name: _by("domain", self.reader.rows(ValidationRow, "pretrain", name, "validation.csv")))
        self.scores: Mapping[str, Scores] = Lazy(
            models, lambda name: self.reader.json(Scores, "evaluate", name, "scores.json"))
        self.samples: Mapping[str, Samples] = Lazy(
            models, lambda name: self.reader.json(Samples, "evaluate", name, "samples.json"))
        self.paper_tasks: Mapping[str, list[PaperScore]] = Lazy(
            models, lambda name: self.reader.json(list[PaperScore], "evaluate", name, "paper_tasks.json"))

    def metrics(self, stage: str, member: str | None = None) -> Metrics:
        """The metrics of a stage. Raises RecordError, also for a model that params.yaml does not list."""
        if member and f"{stage}@{member}" not in self.runs:
            raise RecordError(f"params.yaml: `models` lacks {member}, which the report compares.\nAdd it.")
        return self.reader.metrics(stage, *([member] if member else []))

    def provenance(self, run: str) -> Provenance:
        """Of one of `runs`."""
        return self.reader.json(Provenance, *run.split("@"), "provenance.json")

    def precision_pairs(self, architecture: str) -> list[tuple[str, str]]:
        """FP8 and BF16 variants with the same seed, which see the same text in the same order."""
        seed_of = {name: variant.seed for name, variant in self.params.variants.items()}
        return [(fp8, bf16) for bf16 in self.variants(architecture, "bf16")
                for fp8 in self.variants(architecture, "fp8") if seed_of[fp8] == seed_of[bf16]]

    def variants(self, architecture: str, precision: str) -> list[str]:
        """Without control arms, which have an FP8 recipe of their own."""
        return [name for name, of in self.params.variants.items()
                if (of.architecture, of.precision, getattr(of, "fp8_recipe", None)) == (architecture, precision, None)]

    compressed_model: dict[str, Any] = _record(dict[str, Any], "compress", "model.json")
    candidates: list[Candidate] = _record(list[Candidate], "compress", "candidates.json")
    controls: Controls = _record(Controls, "compress", "controls.json")
    _costs: Costs = _record(Costs, "compress", "costs.json")
    _importance: Importance = _record(Importance, "compress", "importance.json")

    @property
    def importance(self) -> list[LayerImportance]:
        return self._importance.layers

    @property
    def costs(self) -> dict[str, dict[str, float]]:
        """Of parent and compressed, predicted and measured."""
        return self._costs.models

    @property
    def distillation(self) -> dict[str, Curve]:
        """compressed, random: step, tokens, kl"""
        return _by("model", self.reader.rows(DistillationRow, "compress", "distillation.csv"))

    @property
    def decode(self) -> dict[str, list[DecodeRow]]:
        """hybrid, transformer, compressed, by rising context"""
        rows = sorted(self.reader.rows(DecodeRow, "benchmark", "decode.csv"), key=lambda row: row.context)
        found = {name: [row for row in rows if row.model == name] for name in ("hybrid", "transformer", "compressed")}
        if missing := [name for name, points in found.items() if not points]:
            raise record_error(self.reader.root / "benchmark" / "decode.csv", f"no rows for model {missing[0]}")
        return found

    @property
    def decode_repeats(self) -> dict[str, dict[int, list[float]]]:
        """Seconds a token by model and context, repeat by repeat, in each of which every model had its turn."""
        found: dict[str, dict[int, list[float]]] = {}
        for row in self.reader.rows(DecodeRepeat, "benchmark", "decode_repeats.csv"):
            found.setdefault(row.model, {}).setdefault(row.context, []).append(row.seconds_per_token)
        return found


def _columns(rows: list[Any]) -> Curve:
    return {name: [getattr(row, name) for row in rows] for name in type(rows[0]).model_fields}


def _by(group: str, rows: list[Any]) -> dict[str, Curve]:
    """Curves by the value of the column `group`, in order of first appearance."""
    names = dict.fromkeys(getattr(row, group) for row in rows)
    return {name: _columns([row for row in rows if getattr(row, group) == name]) for name in names}
