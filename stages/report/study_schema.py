"""Records of studies that were measured apart from a profile: docs/results/studies/NAME.json, committed.

A record holds what was measured and what is compared, never a verdict: the report computes that anew from `values`
(`stages.report.statistics`). A study fixes its comparisons before it runs.

    Study(study="position", command="python -m ...", machine="2 cores of ...", date="2026-11-29", commit="d6c7349",
          versions={"torch": "2.13.0"}, measurements=[Measurement(...)], comparisons=[Comparison(...)]).save()
"""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from model.config import Record
from stages.frame.common import write

FOLDER = Path("docs/results/studies")
CLAIMS = Path(__file__).with_name("claims.toml")
WORDS = tomllib.loads(CLAIMS.read_text())["claim"]                                      # of every claim, in order
STUDIED = {words["key"]: words["study"] for words in WORDS if "study" in words}         # by which study, if by one

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Measurement(Record):
    """One figure of one model, recipe or method, measured once for each seed, draw, document or repeat.

    Attributes:
        unit: of `values`, as it is shown: "bits per byte", "accuracy", "seconds", "rank correlation".
        better: which direction is the better one; None for a figure that is only shown.
        per: what one value stands for; the report counts in it ("12 seeds would decide").
        items: behind each value of an accuracy; without it, values that are all alike decide nothing.
        chance: what a guess scores; a comparison of two measurements that do not beat it is shown and not counted.
    """

    name: Text
    values: list[Finite] = Field(min_length=1)
    unit: Text
    better: Literal["higher", "lower"] | None
    per: Literal["seed", "draw", "document", "repeat"] = "seed"
    chance: Finite | None = None
    items: Annotated[int, Field(ge=1)] | None = None


class Comparison(Record):
    """What decides a claim: whether `candidate` is better than `reference`, equal to it, or not worse.

    Attributes:
        claim: its key in claims.toml.
        candidate: name of a measurement. One value against several of the reference, unpaired: judged by where a
            further one of the reference's would fall (a chosen value against random draws).
        reference: name of a measurement of the same unit and direction, or a fixed value.
        question: "better" by more than `margin`, "equal" within it, or "not worse" by more than it.
        margin: in the unit; where `relative`, a share (0.001: 0.1 %; with "better", 0.8: 1.8 times). 0 asks for any
            difference, of "better" only.
        relative: values are compared by their ratio (on the logarithmic scale), as timings and losses are.
        paired: value i of both has the same seed, document or repeat.
        control: of "equal" and "not worse": the measurement of a broken candidate, which must be seen to fail by the
            same question; without one the claim is left undecided. Paired with the reference's first values.
    """

    claim: str
    candidate: Text
    reference: Text | Finite
    question: Literal["better", "equal", "not worse"]
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    relative: bool = False
    paired: bool = True
    control: Text | None = None

    @model_validator(mode="after")
    def parts_go_together(self) -> Comparison:
        """Raise ValueError where margin or control do not go with the question."""
        if self.question != "better" and not self.margin:
            raise ValueError(f"`{self.question}` needs a margin")
        if self.question == "better" and self.control:
            raise ValueError("`better` takes no control: no difference fails it")
        return self


class Study(Record):
    """One file.

    Attributes:
        command: makes the record again.
        machine: processor or GPU, and how many.
        date: of the measurement.
        note: what a reader must know; may be empty.
    """

    version: Literal[1] = 1
    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    command: Text
    machine: Text
    date: datetime.date
    commit: Text
    versions: Annotated[dict[str, str], Field(min_length=1)]
    note: str = ""
    measurements: list[Measurement] = Field(min_length=1)
    comparisons: list[Comparison]

    @model_validator(mode="after")
    def names_refer_to_measurements(self) -> Study:
        """Raise ValueError for a comparison of what was not measured, or of a claim of another study."""
        known = {item.name: item for item in self.measurements}
        if len(known) < len(self.measurements):
            raise ValueError("two measurements have one name")
        for item in self.comparisons:
            if STUDIED.get(item.claim) != self.study:
                raise ValueError(f"this study decides no claim `{item.claim}`")
            named = [name for name in (item.candidate, item.reference, item.control) if isinstance(name, str)]
            if unknown := [name for name in named if name not in known]:
                raise ValueError(f"comparisons name {unknown}, which `measurements` lacks")
            found = [known[name] for name in named]
            if len({(one.unit, one.better) for one in found}) > 1 or found[0].better is None:
                raise ValueError(f"{named} differ in unit or direction, or have none")
            fixed = [] if isinstance(item.reference, str) else [item.reference]
            if item.relative and min([*fixed, *(value for one in found for value in one.values)]) <= 0:
                raise ValueError(f"{[*named, *fixed]}: a ratio needs values above 0")
            if item.paired and isinstance(item.reference, str):
                length = len(known[item.reference].values)
                if len(found[0].values) != length or (item.control and len(known[item.control].values) > length):
                    raise ValueError(f"{named} are paired and differ in their number of values")
        return self

    def measurement(self, name: str) -> Measurement:
        """The measurement of this name."""
        return next(item for item in self.measurements if item.name == name)

    def asked(self, claim: str) -> list[Comparison]:
        """Comparisons that decide `claim`."""
        return [item for item in self.comparisons if item.claim == claim]

    def save(self, folder: Path = FOLDER) -> Path:
        """Write FOLDER/STUDY.json and return its path."""
        write(path := folder / f"{self.study}.json", self.model_dump_json(indent=1) + "\n")
        return path
