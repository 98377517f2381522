"""Records of the data stages, as they are written and as the report reads them back (docs/architecture.md)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.config import Label


class Record(BaseModel):
    """A field that is missing or unknown is an error: the record is of another version."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Refused(Record):
    """refused.json, by domain and reason."""

    documents: int
    where: list[str]                # examples: file, and the place in it


class PassedOverCount(Record):
    """passed_over.json, by unit (files, packages, WARC records) and kind."""

    count: int
    where: list[str]


class FunnelStep(Record):
    """funnel.json: what is left of one domain after one step of the curation; `reasons` count documents."""

    domain: str
    step: str
    documents: int
    bytes: int
    reasons: dict[str, int]


class Histogram(Record):
    """histograms.json, by measure and domain: documents by value, and the thresholds of the cut.

    Attributes:
        edges: of the bins, one more than `counts`; neighbours may be equal.
        low: documents below go; None without such a threshold.
        high: documents above go.
        source: where the thresholds come from.
        labels: of a quality scorer, the least score of each label but the lowest.
    """

    edges: list[float] = Field(min_length=2)
    counts: list[int]
    low: float | None
    high: float | None
    source: str
    labels: dict[Label, float]

    @model_validator(mode="after")
    def bins_have_edges(self) -> Histogram:
        """Raises ValueError where there is not one edge more than counts."""
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.edges)} edges do not go with {len(self.counts)} counts")
        return self


class Example(Record):
    """A document that went, or a string that was taken out; `path` and `excerpt` may be empty."""

    source: str
    path: str
    value: str                      # what broke the rule
    excerpt: str


class Dropped(Record):
    """dropped.json, by domain and reason."""

    documents: int
    examples: list[Example]


class TokenFile(Record):
    """What `train/DOMAIN-LABEL` or `validation/DOMAIN` holds; bytes of text."""

    documents: int
    tokens: int
    bytes: int


class BlendPhase(Record):
    """A phase of training: what it reads, in which shares."""

    until: float                    # share of training
    weights: dict[str, float] = Field(min_length=1)     # by token file, their sum 1


class Blend(Record):
    """blend.json: what training reads."""

    tokens: int                     # of training
    phases: list[BlendPhase] = Field(min_length=1)
    repeats: dict[str, float]       # times that training reads each file
    repeats_at_most: float
    files: dict[str, TokenFile]

    @model_validator(mode="after")
    def training_files_have_repeats(self) -> Blend:
        """Raises ValueError for other ones."""
        if self.repeats.keys() != {name for name in self.files if name.startswith("train/")}:
            raise ValueError("`repeats` names other files to train on than `files`")
        return self
