"""Records of an evaluation, as the stage writes them and as the report reads them back."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from model.config import Record

REFERENCE = "SmolLM2-135M-Instruct"
REFERENCE_IS = "4-bit, instruct-tuned, 2 trillion tokens"
Generation = Literal["none", "text", "code"]                # what a model writes itself
Scores = dict[str, list[int] | list[tuple[float, int]]]     # scores.json by task: 1 or 0, or (nats, bytes), an item


class TextSample(Record):
    """samples.json: held-out text, shortened."""

    id: str
    text: str
    bits_per_byte: float


class ChoiceSample(Record):
    """samples.json: an item of a task; `answer` and `chosen` are indices of `choices`."""

    id: str
    context: str
    choices: list[str]
    log_likelihoods: list[float]
    answer: int
    chosen: int


Samples = dict[str, Annotated[list[TextSample | ChoiceSample], Field(min_length=1)]]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PaperTask:
    """One row of the paper's tables.

    Attributes:
        name: in the paper.
        task: in the harness.
        shots: examples before the question.
        metric: `METRIC,FILTER` of the harness's results.
        kind: `choice` scores options, `text` has an answer written, `code` a program, which is run; `absent`: the
            data cannot be had.
        chance: what a guess reaches.
        published: Nemotron-H-8B-Base's figure as a share; None where the model card has none.
        changes: fields of the harness's task that the paper has otherwise.
        gold: and those by which the right answer's text is scored, where the options are letters.
        requests: ready prompts with the right answer, by the set's name; "" where the harness's task scores it.
        level: of those, the ones of this level; "" for all.
    """

    name: str
    task: str
    shots: int
    metric: str
    kind: Literal["choice", "text", "code", "absent"]
    chance: float
    published: float | None
    changes: dict[str, Any] = field(default_factory=dict)
    gold: dict[str, Any] = field(default_factory=dict)
    requests: str = ""
    level: str = ""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PaperScore:
    """paper_tasks.json: a task's result, or in `left_out` why there is no `score`.

    Attributes:
        right: by item, 1 where the model was; `score` is their mean.
        bits_per_byte: of the right answer, over all items; its standard error by bootstrap over them.
        cut: items whose prompt lost its beginning, as the model's context is shorter; where the model also writes
            answers, before which there is less room, those of the prompts for these if they are more.
        by_length: what who always takes the longest option reaches on these items, or the shortest if that is more; of
            k equal ones 1/k. None where there are no options.
    """

    task: PaperTask
    score: float | None = None
    stderr: float | None = None
    right: list[int] = field(default_factory=list)
    items: int = 0
    bits_per_byte: float | None = None
    bits_per_byte_stderr: float | None = None
    cut: int = 0
    left_out: str = ""
    by_length: float | None = None

    @property
    def guess(self) -> float:
        """What is reached without reading: the task's chance, or `by_length` where that is more."""
        return max(self.task.chance, self.by_length or 0.0)
