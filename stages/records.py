"""The small records under runs/PROFILE/, read and checked once: all the report knows.

A missing file is a StageError naming the stage to run; a file without an expected key or column is a DataError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from data_pipeline.config import DataError, Label
from stages.common import Stage
from stages.params import Params

LABELS: tuple[Label, ...] = get_args(Label)         # of quality, the best first


class Metrics(dict[str, float]):
    """The numbers of one metrics.json; texts in it, such as digests, are left out."""

    def __init__(self, path: Path):
        self.path = path
        super().__init__({key: value for key, value in _read_json(path, dict).items()
                          if isinstance(value, int | float) and not isinstance(value, bool)})

    def __missing__(self, key: str) -> float:
        raise DataError(f"{self.path}: `{key}` is missing or not a number.\nRun the stage that writes it again.")


@dataclass(frozen=True)
class Provenance:
    """provenance.json: `started` in seconds since 1970, `wall_seconds`, `peak_memory_gib`, and the rest as written."""

    stage: str
    variant: str | None
    command: str
    started: float
    wall_seconds: float
    resumed: bool
    peak_memory_gib: float
    inputs: dict[str, str]
    commit: str | None
    code_digest: str
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def ended(self) -> float:
        return self.started + self.wall_seconds


@dataclass(frozen=True)
class Run:
    """One stage, or one member of a `foreach` stage."""

    metrics: Metrics
    provenance: Provenance


@dataclass(frozen=True)
class FunnelStep:
    """What is left of one domain after one curation step."""

    domain: str
    step: str
    documents: int
    bytes: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Histogram:
    """One measure of one domain's documents, with the thresholds that the cut set it."""

    measure: str
    domain: str
    edges: list[float]              # one more than counts
    counts: list[int]               # documents
    low: float | None
    high: float | None
    source: str                     # where the thresholds come from
    labels: dict[str, float]        # of a quality scorer: the least score of each label but the lowest


@dataclass(frozen=True)
class Example:
    """A document that went, or a string that was taken out; `path`, `excerpt` may be empty."""

    source: str
    path: str
    value: str                      # what broke the rule
    excerpt: str


@dataclass(frozen=True)
class Dropped:
    domain: str
    reason: str
    documents: int
    examples: list[Example]


@dataclass(frozen=True)
class TokenFile:
    """One file of training tokens, `train/DOMAIN-LABEL`; bytes are of text."""

    domain: str
    label: Label
    documents: int
    tokens: int
    bytes: int
    repeats: float                  # times it is read in training


@dataclass(frozen=True)
class BlendPhase:
    until: float                    # share of training
    weights: dict[tuple[str, Label], float]     # by domain and label


@dataclass(frozen=True)
class Blend:
    tokens: int                     # that training reads
    phases: list[BlendPhase]
    files: list[TokenFile]
    repeats_at_most: float


@dataclass(frozen=True)
class DataRecords:
    """Every record of the data stages. `blend` is None where nothing was tokenized."""

    metrics: dict[str, Metrics]     # by stage: annotate, curate and, where they ran, tokenizer, tokenize
    funnel: list[FunnelStep]
    histograms: list[Histogram]
    dropped: list[Dropped]
    blend: Blend | None

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(row.domain for row in self.funnel))

    def steps(self, domain: str) -> list[FunnelStep]:
        return [row for row in self.funnel if row.domain == domain]

    def files(self, domain: str) -> list[TokenFile]:
        """The token files of a domain, the best label first; none before tokenizing."""
        found = [file for file in (self.blend.files if self.blend else []) if file.domain == domain]
        return sorted(found, key=lambda file: LABELS.index(file.label))


@dataclass(frozen=True)
class Candidate:
    """One architecture of the compression search; None where a later round was not reached, or nothing timed."""

    pattern: str
    ffn_hidden_size: int
    parameters: int
    memory_gib: float
    decode_milliseconds: float | None
    importance: float
    accuracy: float | None
    agreement: float | None
    kl_cut: float | None
    task_accuracy: float | None
    kl_short: float | None
    chosen: bool


@dataclass(frozen=True)
class Layer:
    index: int
    symbol: str
    importance: float
    standard_error: float
    influence: float


@dataclass(frozen=True)
class CutControls:
    """KL to the parent of cuts to the chosen shape, before distillation."""

    importance: float
    random: list[float]             # by seed
    seeds: list[int]
    reverse: float


@dataclass(frozen=True)
class DecodePoint:
    model: str
    context: int
    tokens_per_second: float
    seconds_per_token_spread: float
    decode_of_floor: float
    cache_mib: float
    memory_gib: float
    time_to_first_token: float | None           # None, as the two below, where no prompt so long was read
    prefill_of_floor: float | None
    output_tokens_per_second: float | None      # prompts included


Curve = dict[str, list[float]]      # columns of equal length


@dataclass(frozen=True)
class Records:
    """Every record of one profile. Dictionaries by model or variant stand in the order of params.yaml."""

    params: Params
    runs: dict[str, Run]                                # "curate", "pretrain@hybrid-fp8", ... in the graph's order
    data: DataRecords
    training: dict[str, Curve]                          # step, tokens, loss, grad_norm
    validation: dict[str, dict[str, Curve]]             # by variant and domain: step, tokens, loss, bits_per_byte
    compressed_model: dict[str, Any]
    importance: list[Layer]
    ffn_importance: dict[int, dict[int, float]]         # by layer and width: share of importance kept
    reliability: dict[str, float]                       # of importance, by axis
    candidates: list[Candidate]
    controls: CutControls
    costs: dict[str, dict[str, float]]                  # of parent and compressed, predicted and measured
    distillation: dict[str, Curve]                      # compressed, random: tokens, kl
    decode: dict[str, list[DecodePoint]]                # hybrid, transformer, compressed, by rising context
    scores: dict[str, dict[str, list[Any]]]             # by model and task: 1 or 0, or (nats, bytes), of every item
    paper_tasks: dict[str, list[dict[str, Any]]]        # by model: model.paper_tasks.PaperScore

    def metrics(self, stage: str, member: str | None = None) -> Metrics:
        """The metrics of a stage. Raises DataError for a model that params.yaml does not list."""
        if member and f"{stage}@{member}" not in self.runs:
            raise DataError(f"params.yaml: `models` lacks {member}, which the report compares.\nAdd it.")
        return self.runs[f"{stage}@{member}" if member else stage].metrics

    @property
    def hybrid_seeds(self) -> list[str]:
        """BF16 variants of the hybrid that differ in their seed alone; the first is the reference."""
        return self._variants("hybrid", "bf16")

    @property
    def fp8(self) -> str | None:
        """The FP8 twin of the first BF16 hybrid: the same seed."""
        if not self.hybrid_seeds:
            return None
        seed = self.params.variants[self.hybrid_seeds[0]].seed
        same_seed = [name for name in self._variants("hybrid", "fp8") if self.params.variants[name].seed == seed]
        return same_seed[0] if same_seed else None

    @property
    def fp8_pairs(self) -> list[tuple[str, str]]:
        """FP8 and BF16 variants of the hybrid with the same seed, which see the same text in the same order."""
        seed_of = {name: self.params.variants[name].seed for name in self.params.variants}
        return [(fp8, bf16) for bf16 in self.hybrid_seeds for fp8 in self._variants("hybrid", "fp8")
                if seed_of[fp8] == seed_of[bf16]]

    @property
    def transformer(self) -> str | None:
        return next(iter(self._variants("transformer", "bf16")), None)

    @property
    def accelerator(self) -> str | None:
        """The GPU the benchmark ran on, None on a CPU."""
        return self.runs["benchmark"].provenance.machine.get("accelerator")

    def _variants(self, architecture: str, precision: str) -> list[str]:
        """Without control arms, which have an FP8 recipe of their own."""
        return [name for name, variant in self.params.variants.items()
                if (variant.architecture, variant.precision, variant.fp8_recipe) == (architecture, precision, None)]


def load(stage: Stage) -> Records:
    """Read every record of the profile. Raises StageError for a missing file, DataError for a malformed one."""
    params = stage.params
    stages = ("annotate", "curate", "tokenizer", "tokenize", "pretrain", "compress", "export", "items", "evaluate",
              "benchmark")
    members = {"pretrain": list(params.variants), "export": params.models, "evaluate": params.models}
    runs: dict[str, Run] = {}
    for name in stages:
        for member in members.get(name, [None]):
            parts = (name, member) if member else (name,)
            runs["@".join(parts)] = Run(Metrics(stage.record(*parts, "metrics.json")),
                                        _provenance(stage.record(*parts, "provenance.json")))
    training = {name: _columns(stage.record("pretrain", name, "training.csv"), ("step", "tokens", "loss", "grad_norm"))
                for name in params.variants}
    validation = {name: _by(stage.record("pretrain", name, "validation.csv"), "domain",
                            ("step", "tokens", "loss", "bits_per_byte")) for name in params.variants}
    return Records(
        params=params,
        runs=runs,
        data=load_data(stage.record),
        training=training,
        validation=validation,
        compressed_model=_read_json(stage.record("compress", "model.json"), dict),
        importance=_objects(stage.record("compress", "importance.json"), Layer, "layers"),
        ffn_importance=_ffn_importance(stage.record("compress", "importance.json")),
        reliability=_entry(stage.record("compress", "importance.json"), "reliability"),
        candidates=_objects(stage.record("compress", "candidates.json"), Candidate),
        controls=_controls(stage.record("compress", "controls.json")),
        costs=_entry(stage.record("compress", "costs.json"), "models"),
        distillation=_by(stage.record("compress", "distillation.csv"), "model", ("tokens", "kl")),
        decode=_decode(stage.record("benchmark", "decode.csv")),
        scores={name: _read_json(stage.record("evaluate", name, "scores.json"), dict) for name in params.models},
        paper_tasks={name: _read_json(stage.record("evaluate", name, "paper_tasks.json"), list)
                     for name in params.models},
    )


def load_data(find: Callable[..., Path], tokenized: bool = True) -> DataRecords:
    """The records of the data stages.

    Args:
        find: from ("curate", "funnel.json") to the file, as `Stage.record` does.
        tokenized: whether there is a tokenizer and what it made of the text.

    Raises:
        DataError: a file is malformed; and what `find` raises.
    """
    stages = ("annotate", "curate", "tokenizer", "tokenize") if tokenized else ("annotate", "curate")
    return DataRecords(
        metrics={name: Metrics(find(name, "metrics.json")) for name in stages},
        funnel=_objects(find("curate", "funnel.json"), FunnelStep),
        histograms=_histograms(find("curate", "histograms.json")),
        dropped=_dropped(find("curate", "dropped.json")),
        blend=_blend(find("tokenize", "blend.json")) if tokenized else None,
    )


def _histograms(path: Path) -> list[Histogram]:
    content = _read_json(path, dict)
    try:
        found = [Histogram(measure, domain, **entry) for measure, domains in content.items()
                 for domain, entry in domains.items()]
    except (AttributeError, TypeError) as error:
        raise _not_as_expected(path, error) from None
    for item in found:
        if len(item.edges) != len(item.counts) + 1:
            raise _not_as_expected(path, f"{item.measure} of {item.domain}: edges and counts do not go together")
    return found


def _dropped(path: Path) -> list[Dropped]:
    try:
        return [Dropped(domain, reason, entry["documents"], [Example(**example) for example in entry["examples"]])
                for domain, reasons in _read_json(path, dict).items() for reason, entry in reasons.items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise _not_as_expected(path, error) from None


def _blend(path: Path) -> Blend:
    def parts(name: str) -> tuple[str, Label]:
        domain, _, label = name.removeprefix("train/").partition("-")
        return domain, LABELS[LABELS.index(label)]

    content = _read_json(path, dict)
    try:
        return Blend(
            tokens=content["tokens"],
            phases=[BlendPhase(phase["until"], {parts(name): weight for name, weight in phase["weights"].items()})
                    for phase in content["phases"]],
            files=[TokenFile(*parts(name), **content["files"][name], repeats=times)
                   for name, times in content["repeats"].items()],
            repeats_at_most=content["repeats_at_most"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _not_as_expected(path, error) from None


def _not_as_expected(path: Path, error: Exception | str) -> DataError:
    return DataError(f"{path}: not as expected ({error if isinstance(error, str) else repr(error)}).\n"
                     "Run the stage that writes it again.")


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}).\nRun the stage that writes it again.") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: expected a JSON {kind.__name__}.\nRun the stage that writes it again.")
    return content


def _objects(path: Path, kind: Any, key: str | None = None) -> list[Any]:
    """The JSON list in `path` (under `key`) as objects of the dataclass `kind`, fields it does not name left out."""
    rows = _read_json(path, dict).get(key) if key else _read_json(path, list)
    names = [field.name for field in fields(kind)]
    try:
        return [kind(**{name: row[name] for name in names}) for row in rows]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a row lacks {error}; {', '.join(names)} are expected.\n"
                        "Run the stage that writes it again.") from None


def _entry(path: Path, key: str) -> Any:
    """The JSON object under `key`."""
    found = _read_json(path, dict).get(key)
    if not isinstance(found, dict):
        raise _not_as_expected(path, f"`{key}` is no object")
    return found


def _controls(path: Path) -> CutControls:
    try:
        return CutControls(**_read_json(path, dict))
    except TypeError as error:
        raise _not_as_expected(path, error) from None


def _ffn_importance(path: Path) -> dict[int, dict[int, float]]:
    try:
        return {row["index"]: {int(width): share for width, share in sorted(
            row["kept_share_of_importance"].items(), key=lambda pair: int(pair[0]))}
            for row in _read_json(path, dict)["ffn"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: `ffn` is not as expected ({error!r}).\nRun `dvc repro compress` again.") from None


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
            raise DataError(f"{path}: column {', '.join(missing)} missing.\nRun the stage that writes it again.")
        rows = list(reader)
    if not rows:
        raise DataError(f"{path}: no rows.\nRun the stage that writes it again.")
    return rows


def _number(path: Path, row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise DataError(f"{path}: {column} is {row[column]!r}, not a number.\n"
                        "Run the stage that writes it again.") from None


def _columns(path: Path, columns: tuple[str, ...]) -> Curve:
    rows = _rows(path, columns)
    return {name: [_number(path, row, name) for row in rows] for name in columns}


def _by(path: Path, group: str, columns: tuple[str, ...]) -> dict[str, Curve]:
    """Curves by the value of the column `group`, in order of first appearance."""
    curves: dict[str, Curve] = {}
    for row in _rows(path, (group, *columns)):
        curve = curves.setdefault(row[group], {name: [] for name in columns})
        for name in columns:
            curve[name].append(_number(path, row, name))
    return curves


def _decode(path: Path) -> dict[str, list[DecodePoint]]:
    columns = ("tokens_per_second", "seconds_per_token_spread", "decode_of_floor", "cache_mib", "memory_gib")
    of_prompt = ("time_to_first_token_seconds", "prefill_of_floor", "output_tokens_per_second")
    points: dict[str, list[DecodePoint]] = {}
    for row in _rows(path, ("model", "context", *columns, *of_prompt)):
        figures = [_number(path, row, name) for name in columns]
        prompt = [_number(path, row, name) if row[name] else None for name in of_prompt]
        context = int(_number(path, row, "context"))
        points.setdefault(row["model"], []).append(DecodePoint(row["model"], context, *figures, *prompt))
    for model in ("hybrid", "transformer", "compressed"):
        if model not in points:
            raise DataError(f"{path}: no rows for model {model}.\nRun `dvc repro benchmark` again.")
    return {model: sorted(rows, key=lambda point: point.context) for model, rows in points.items()}


def _provenance(path: Path) -> Provenance:
    content = _read_json(path, dict)
    try:
        return Provenance(
            stage=content["stage"], variant=content["variant"], command=content["command"],
            started=datetime.fromisoformat(content["started"]).timestamp(),
            wall_seconds=content["wall_seconds"], resumed=content["resumed"],
            peak_memory_gib=content["peak_memory_gib"], inputs=content["inputs"], commit=content["code"]["commit"],
            code_digest=content["code"]["digest"], versions=content["versions"], machine=content["machine"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {error!r} while reading.\nRun the stage that writes it again.") from None
