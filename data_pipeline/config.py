"""Configuration of the data stages."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

Label = Literal["high", "medium-high", "medium", "medium-low", "low"]
Domain = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


PAPER_TASKS = "paper-tasks"


class DataError(ValueError):
    """Input the data stages cannot use. Its text is two lines: what is wrong (file, field), what to do.

    Messages are written with "in params.yaml"; a command whose settings stand elsewhere says so in `settings`.
    """

    settings: ClassVar[str] = "in params.yaml"

    def __str__(self) -> str:
        return super().__str__().replace("in params.yaml", self.settings)


class Section(BaseModel):
    """A section of params.yaml: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# where work is done: no result depends on it

class DaskConfig(Section):
    """Dask's scheduler."""

    scheduler: str | None = None    # its address; None starts `workers` processes here


class RayConfig(Section):
    """Ray's cluster."""

    address: str | None = None      # of a cluster, or "auto"; None starts one with `workers` processes here


class SlurmConfig(Section):
    """Jobs through submitit; `local` and `debug` are its stand-ins where there is no Slurm."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    folder: str = ".slurm"          # job scripts and logs; every node must see it
    partition: str | None = None
    timeout_minutes: int = Field(default=120, ge=1)
    memory_gigabytes: float = Field(default=8, gt=0)


class ExecutorConfig(Section):
    """What works on shards. Every worker must see the paths the stage works with."""

    executor: Literal["local", "dask", "ray", "slurm"]
    workers: int = Field(ge=1)      # shards worked on at once
    dask: DaskConfig = DaskConfig()
    ray: RayConfig = RayConfig()
    slurm: SlurmConfig = SlurmConfig()


# annotate: from sources to documents with everything a cut may ask about

class InstalledSource(Section):
    """The embedded corpus: the dependency closure of `roots` and the standard library, read in place.

    `all` stands for every installed distribution; the corpus is then that machine's own.
    """

    kind: Literal["installed"]
    roots: Literal["all"] | Annotated[list[str], Field(min_length=1)]
    megabytes: dict[Literal["code", "docs", "headers", "reference"], Annotated[float, Field(gt=0)]] = Field(
        min_length=1)                           # of each domain


class FilesSource(Section):
    """Records (JSONL, CSV, Parquet), texts, HTML pages, web archives, also packed, in tar or ZIP, or by URL.

    `paths` may hold wildcards, directories and listings of files (`.paths`).
    """

    kind: Literal["files"]
    paths: list[str] = Field(min_length=1)
    text_column: str = "text"
    extractor: Literal["justext", "resiliparse"] = "justext"    # of HTML: Nemotron-CC's; one 7 times as fast
    domain: Domain
    license: str = "unknown"
    megabytes: float | None = Field(default=None, gt=0)         # of text; None reads everything


class HubSource(Section):
    """A data set of the Hugging Face Hub, streamed."""

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str                   # a commit, so that a run can be repeated
    text_column: str = "text"
    domain: Domain
    license: str = "unknown"
    megabytes: float | None = Field(default=None, gt=0)


class WebSource(Section):
    """WARC or WET files, from disk or by URL; in a directory nothing else is read."""

    kind: Literal["web"]
    paths: list[str] = Field(min_length=1)
    extractor: Literal["justext", "resiliparse"] = "justext"    # Nemotron-CC's; one 7 times as fast
    domain: Domain = "web"
    megabytes: float | None = Field(default=None, gt=0)


Source = Annotated[InstalledSource | FilesSource | HubSource | WebSource, Field(discriminator="kind")]


def domains_of(source: Source) -> list[str]:
    """The domains of the documents that are read of `source`."""
    return list(source.megabytes) if isinstance(source, InstalledSource) else [source.domain]


class HeldOutConfig(Section):
    """Text set aside for evaluation, as whole sources (distributions, sites, files) or as single documents."""

    fraction: float = Field(ge=0, lt=0.5)       # of each domain's bytes
    unit: Literal["source", "document"]


class MinHashConfig(Section):
    """Two documents with Jaccard similarity J of their shingles meet with probability 1 - (1 - J^rows)^bands."""

    shingle_characters: int = Field(ge=2)
    bands: int = Field(ge=1)
    rows: int = Field(ge=1)


class SubstringConfig(Section):
    """Strings of at least `bytes` bytes that stood before, in the text of these domains."""

    bytes: int = Field(ge=16)
    domains: list[Domain]


class DecontaminationConfig(Section):
    """Runs of `ngram` words shared with held-out text, or with evaluation sets.

    `against` names files of them; `paper-tasks` stands for those of the paper's tasks, `data_pipeline.evaluation_sets`.
    """

    ngram: int = Field(ge=2)
    against: list[str] = []

    @property
    def files(self) -> list[str]:
        """Of `against`, the files."""
        return [name for name in self.against if name != PAPER_TASKS]


class ClassifierConfig(Section):
    """A regression or classification model of the Hub, or a local directory, as a quality scorer."""

    model: str
    revision: str | None = None
    label: int = 0                  # which output is the score
    batch: int = Field(default=64, ge=1)

    @property
    def name(self) -> str:
        """What its scores are called."""
        return f"{self.model}[{self.label}]" if self.label else self.model


class AnnotateConfig(Section):
    """What is read, and what is found out about each document."""

    sources: list[Source] = Field(min_length=1)
    shard_megabytes: FiniteFloat = Field(gt=0)  # text a worker holds at a time
    mask: list[Literal["email", "ip", "phone", "secret"]]
    held_out: HeldOutConfig
    minhash: MinHashConfig
    substring: SubstringConfig
    decontamination: DecontaminationConfig
    scorers: list[Literal["fluency", "reference", "structure"] | ClassifierConfig] = Field(min_length=1)

    @property
    def scorer_names(self) -> list[str]:
        """What the values of the column `scores` are called."""
        return [scorer if isinstance(scorer, str) else scorer.name for scorer in self.scorers]

    @model_validator(mode="after")
    def scorers_have_names_of_their_own(self) -> AnnotateConfig:
        """Raises ValueError where two have one: the histogram of one would hide the other's."""
        names = self.scorer_names
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"scorers: {twice[0]} stands in it twice\nTake one away.")
        return self


# curate: what is cut, and what it is labelled

class LanguageConfig(Section):
    """Natural language that stays."""

    keep: list[str] = Field(min_length=1)       # ISO 639-1
    share: float = Field(ge=0, le=1)            # of the text's bytes, at least
    domains: list[Domain]                       # the others are not natural language


class RulesConfig(Section):
    """Heuristic rules of a domain: a set by name, applied to documents of these quality labels."""

    set: Literal["code", "prose", "reference", "web"]
    labels: list[Label] = Field(min_length=1)
    thresholds: dict[str, tuple[FiniteFloat | None, FiniteFloat | None]] = {}   # feature -> (low, high), for the set's

    @model_validator(mode="after")
    def thresholds_are_ranges(self) -> RulesConfig:
        """Raises ValueError for a low above its high, which every document of the labels would break."""
        for feature, (low, high) in self.thresholds.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"thresholds.{feature}: {low:g} to {high:g} is no range\nThe lower one comes first.")
        return self


class PerplexityConfig(Section):
    """The share of a domain's bytes with the highest perplexity goes, where its label is one of these."""

    labels: list[Label]
    share: float = Field(ge=0, lt=1)


class SynthesisConfig(Section):
    """Rephrasing by a language model behind an OpenAI-compatible endpoint (Nemotron-CC, section 2.2)."""

    enabled: bool
    base_url: str
    model: str
    key_variable: str               # name of the environment variable that holds the key
    concurrency: int = Field(ge=1)
    timeout_seconds: float = Field(gt=0)
    retries: int = Field(ge=0)
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    megabytes: float = Field(gt=0)              # of source text, at most


class CurateConfig(Section):
    """What is cut; a change costs no annotation."""

    language: LanguageConfig
    rules: dict[Domain, RulesConfig]
    perplexity: PerplexityConfig
    contamination: int = Field(ge=0)            # shared n-grams a document may have
    synthesis: SynthesisConfig


class TokenizerConfig(Section):
    """The vocabulary, and how much text it is learnt from."""

    vocab_size: int = Field(ge=512, multiple_of=16)     # FP8 GEMMs and vLLM want multiples of 16
    training_megabytes: float = Field(gt=0)


class Phase(Section):
    """A stretch of training with its own blend (paper section 2.2.3)."""

    until: float = Field(gt=0, le=1)
    weights: dict[str, FiniteFloat]
    labels: list[Label] = Field(min_length=1)


class TokenizeConfig(Section):
    """The validation set, and the phases of training."""

    tokenizer: str | None = None                # a Hugging Face directory, for a model from elsewhere; None: our own
    validation_kilobytes_per_domain: int = Field(ge=1)
    phases: list[Phase] = Field(min_length=1)
    repeats: float = Field(ge=1)                # times a document may be seen in training, at most

    @model_validator(mode="after")
    def phases_cover_training(self) -> TokenizeConfig:
        """Raises ValueError where they do not."""
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError(f"phases must end at rising shares of training, the last at 1.0; got {ends}")
        return self
