"""params.yaml as typed values: every key known, every value possible, or one clear error.

`load_params()` returns `Params`. Sections are the configuration classes that live beside the code they configure;
this module only puts them together and words the errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, PositiveInt, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from data_pipeline.config import (
    AnnotateConfig,
    CurateConfig,
    ExecutorConfig,
    TokenizeConfig,
    TokenizerConfig,
    domains_of,
)
from model.compression.config import CompressConfig
from model.config import Geometry, ModelConfig, PretrainConfig, Section
from stages.frame.launch import LauncherConfig

Seed = Annotated[int, Field(ge=0, lt=2**32)]        # NumPy takes no other
COMPRESSED = {"compressed", "compressed-random"}    # what compress writes beside the variants
T = TypeVar("T")


def _each_once(values: list[T]) -> list[T]:
    """Raise ValueError for what stands in a list twice: its results have one name, the last would hide the first."""
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{twice[0]} stands in it twice\nTake one away.")
    return values


Once = AfterValidator(_each_once)


class ParamsError(SystemExit):
    """A params.yaml that cannot be used. Its text is what the user reads; the exit code is 1."""


class Variant(Section):
    """One pretraining run: an architecture of the `model` section, a precision and a seed.

    Attributes:
        fp8_recipe: in place of `pretrain.fp8_recipe`, for a control arm; null for all others.
    """

    architecture: str
    precision: Literal["bf16", "fp8"]
    seed: Seed
    fp8_recipe: Literal["current", "unscaled"] | None = None

    @model_validator(mode="after")
    def recipe_has_an_effect(self) -> Variant:
        """Raise ValueError for an FP8 recipe of a variant that is not FP8."""
        if self.fp8_recipe and self.precision != "fp8":
            raise ValueError(f"fp8_recipe {self.fp8_recipe} with precision {self.precision}\n"
                             "Set precision to fp8, or leave fp8_recipe out.")
        return self


class ExportConfig(Section):
    """`export`: type of the exported weights, and size of a file of them in GB."""

    dtype: Literal["float32", "bfloat16"]
    shard_gigabytes: float = Field(gt=0)


class EvaluateConfig(Section):
    """What is asked.

    Attributes:
        context_multiples: lengths of the copy, recall and needle items, in `context_tokens`.
        paper_items: of each of the paper's tasks (model.evaluation.paper_tasks), at most.
        generation: what a model writes itself: nothing, answers to mathematics, or programs too, run in a sandbox.
        reference_share: of all that is asked, the share that the reference is asked; 0 leaves it out.
    """

    items_per_task: int = Field(ge=4)
    bits_per_byte_kilobytes: int = Field(ge=1)
    recall_pairs: int = Field(ge=2)
    context_tokens: int = Field(ge=64)
    context_multiples: Annotated[list[PositiveInt], Once] = Field(min_length=1)
    items_per_context: int = Field(ge=4)
    paper_items: int = Field(ge=1)
    generation: Literal["none", "text", "code"]
    reference_share: float = Field(ge=0, le=1)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest context that is asked."""
        return self.context_tokens * max(self.context_multiples)


class BenchmarkConfig(Section):
    """`benchmark`: contexts and output in tokens, batch in sequences."""

    contexts: Annotated[list[PositiveInt], Once] = Field(min_length=1)
    batch: int = Field(ge=1)
    decode_tokens: int = Field(ge=1)
    repeats: int = Field(ge=1)
    longest_prompt: int = Field(ge=0)
    output_tokens: int = Field(ge=1)
    published: Annotated[list[Literal["8b", "47b"]], Once]


class ParallelConfig(Section):
    """How pretraining is spread over its processes (`megatron.distributed.Parallelism`); the rest is data parallel.
    Evaluation and the benchmark take `tensor` alone."""

    tensor: int = Field(default=1, ge=1)
    sequence: bool = False
    pipeline: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def sequence_has_ranks(self) -> ParallelConfig:
        """Raise ValueError for a sequence that is to be split over one tensor-parallel process."""
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence is split over the tensor-parallel processes, and tensor is 1\n"
                             "Set sequence to false, or raise tensor.")
        return self


class RuntimeConfig(ExecutorConfig):
    """How to run, never what: no stage depends on it.

    Attributes:
        verify_megabytes: outputs up to this size are hashed before every use (`stages.frame.outputs`); larger ones when
            they change, and when DVC restores them.
    """

    slots: int = Field(ge=1)
    threads: int = Field(ge=1)
    verify_megabytes: int = Field(default=1024, ge=0)
    stage_timeout_minutes: float = Field(gt=0)
    launcher: LauncherConfig = LauncherConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def layout_fits_processes(self) -> RuntimeConfig:
        """Raise ValueError unless the launcher's processes are a whole number of copies of the model."""
        copy = self.parallel.tensor * self.parallel.pipeline
        if self.launcher.processes % copy:
            raise ValueError(
                f"launcher starts {self.launcher.processes} processes, parallel.tensor ({self.parallel.tensor}) x "
                f"pipeline ({self.parallel.pipeline}) = {copy} of them hold one model\n"
                f"Make nodes x processes_per_node a multiple of {copy}, or change the layout."
            )
        return self

    @property
    def verify_bytes(self) -> int:
        """Size of the largest input that is read again before it is used."""
        return self.verify_megabytes * 2**20

    @property
    def one_model(self) -> LauncherConfig:
        """How evaluation and the benchmark are started: one process for each tensor parallel part of the model, all on
        one node."""
        return self.launcher.model_copy(update={"nodes": 1, "processes_per_node": self.parallel.tensor})


class Params(Section):
    """All of params.yaml."""

    profile: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: Seed
    annotate: AnnotateConfig
    curate: CurateConfig
    tokenizer: TokenizerConfig
    tokenize: TokenizeConfig
    model: dict[str, Geometry]
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")], Variant]      # they name directories
    pretrain: PretrainConfig
    compress: CompressConfig
    models: Annotated[list[str], Once]
    export: ExportConfig
    evaluate: EvaluateConfig
    benchmark: BenchmarkConfig
    runtime: RuntimeConfig

    @model_validator(mode="after")
    def names_refer_to_something(self) -> Params:
        """Raise ValueError for a name that nothing defines, or settings of different sections that contradict."""
        if lacking := {"hybrid", "transformer"} - self.model.keys():
            raise ValueError(f"`model` has no {' and no '.join(sorted(lacking))}, which the stage benchmark times\n"
                             "Keep it under that name; no variant needs to train it.")
        if taken := sorted(COMPRESSED & self.variants.keys()):
            raise ValueError(f"variants.{taken[0]}: the stage compress writes a model of that name\nChoose another.")
        first: dict[tuple[Any, ...], str] = {}
        for name, variant in self.variants.items():
            if variant.architecture not in self.model:
                raise ValueError(
                    f"variants.{name}.architecture is '{variant.architecture}', which `model` does not define "
                    f"(it has: {', '.join(self.model)})"
                )
            self._check_recipe(name)
            trained = (variant.architecture, variant.precision, variant.seed, self.recipe_of(name).fp8_recipe)
            if (one := first.setdefault(trained, name)) != name:        # of one seed the report compares one alone
                raise ValueError(f"variants.{one} and variants.{name} are one and the same training\n"
                                 "Give one of them another seed or fp8_recipe, or leave it out.")
        self._check_domains()
        if self.compress.parent not in self.variants:
            raise ValueError(f"compress.parent is '{self.compress.parent}', which `variants` does not define")
        known = COMPRESSED | self.variants.keys()
        if unknown := [name for name in self.models if name not in known]:
            raise ValueError(f"models names {unknown}, known are {sorted(known)}")
        return self

    def _check_recipe(self, name: str) -> None:
        """Raise ValueError where a variant's recipe cannot be, or its FP8 would compute nothing in FP8."""
        variant, layers = self.variants[name], len(self.model[self.variants[name].architecture].pattern)
        try:
            recipe = self.recipe_of(name)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"variants.{name}: {message}") from None
        if variant.precision == "fp8" and not recipe.fp8_layers(layers):
            raise ValueError(
                f"variants.{name}: pretrain.bf16_layers_at_start ({recipe.bf16_layers_at_start}) and _at_end "
                f"({recipe.bf16_layers_at_end}) leave none of its {layers} layers to compute in FP8\n"
                "Lower them, or give the variant precision bf16."
            )

    def _check_domains(self) -> None:
        """Raise ValueError where a domain that is read has no rules, or where one is named that is not read."""
        read = {domain for source in self.annotate.sources for domain in domains_of(source)}
        if bare := sorted(read - self.curate.rules.keys()):
            raise ValueError(f"curate.rules has no entry for {', '.join(bare)}, which annotate.sources reads\n"
                             "Add a set of rules and the labels whose documents it is for, as docs/data.md says.")
        for field, named in (("curate.language.domains", self.curate.language.domains),
                             ("annotate.substring.domains", self.annotate.substring.domains)):
            if unknown := sorted(set(named) - read):
                raise ValueError(f"{field} names {', '.join(unknown)}, which annotate.sources does not read "
                                 f"(it reads: {', '.join(sorted(read))})\nTake it out, or correct it.")

    def recipe_of(self, variant: str) -> PretrainConfig:
        """The recipe of a variant: `pretrain`, with its own FP8 recipe where it has one."""
        own = self.variants[variant].fp8_recipe
        return PretrainConfig(**self.pretrain.model_dump() | {"fp8_recipe": own}) if own else self.pretrain

    def model_of(self, variant: str) -> ModelConfig:
        """Geometry of a variant's architecture with the tokenizer's vocabulary."""
        geometry = self.model[self.variants[variant].architecture]
        return ModelConfig(**geometry.model_dump(), vocab_size=self.tokenizer.vocab_size)


def read_yaml(path: Path, yaml: YAML | None = None, empty: dict[str, Any] | None = None) -> dict[str, Any]:
    """The YAML mapping in `path`, as plain values, or as `yaml` reads it. Raises ParamsError.

    Args:
        empty: what a file without values stands for; None refuses it.
    """
    try:
        values = (yaml or YAML(typ="safe")).load(path.read_text())
    except FileNotFoundError:
        raise ParamsError(f"{path}: not found.\nRun from the repository's root, or restore the file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read ({error}).\nRestore the file.") from None
    except (YAMLError, ValueError) as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}\nCorrect that line.") from None
    if values is None and empty is not None:
        return empty
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: expected `section: values`.\nRestore the file.")
    return values


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply `a.b=value` (value in YAML) to nested `values`; of a list, `a.0.b=value`. Raises ParamsError."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ParamsError(f"--set {assignment}: expected KEY=VALUE, for example pretrain.learning_rate=1e-3.")
    *parents, last = key.split(".")
    inner: Any = values
    for parent in parents:
        if isinstance(inner, list):
            inner = inner[int(parent)] if parent.isdecimal() and int(parent) < len(inner) else None
        else:
            inner = inner.setdefault(parent, {})
        if not isinstance(inner, dict | list):
            raise ParamsError(f"--set {assignment}: `{parent}` is a value, not a section.")
    if isinstance(inner, list):
        raise ParamsError(f"--set {assignment}: sets a list's item as a whole.\nSet a field of it, or the whole list.")
    try:
        inner[last] = YAML(typ="safe").load(text)
    except (YAMLError, ValueError) as error:
        raise ParamsError(f"--set {assignment}: not valid YAML: {' '.join(str(error).split())}\n"
                          "Correct the value.") from None


def load_params(path: Path | str = "params.yaml", overrides: tuple[str, ...] = ()) -> Params:
    """Read and check `path`, with `overrides` (`section.key=value`) applied. Raises ParamsError."""
    path = Path(path)
    try:
        return _checked(path, overrides)
    except ValidationError as error:
        raise ParamsError("\n".join(_explain(_place(path, overrides, item), item) for item in error.errors())) from None


def _checked(path: Path, overrides: Iterable[str]) -> Params:
    values = read_yaml(path)
    for assignment in overrides:
        set_value(values, assignment)
    params = Params.model_validate(values)
    for place, value in _truths(values, params.model_dump()):       # pydantic makes 1 of true
        raise ParamsError(f"{path}: `{place}`: a truth value ({str(value).lower()}) where a number stands.\n"
                          "Correct the value.")
    return params


def _truths(given: Any, read: Any, place: str = "") -> Iterator[tuple[str, bool]]:
    """Where truth values were given, and read as something else."""
    if isinstance(given, bool) and not isinstance(read, bool):
        yield place, given
    elif isinstance(given, dict | list) and isinstance(read, type(given)):
        for key, value in given.items() if isinstance(given, dict) else enumerate(given):
            yield from _truths(value, read[key], f"{place}.{key}".lstrip("."))


def refuse_unread(path: Path | str, overrides: Sequence[str], settings: Sequence[str], reader: str) -> None:
    """Raise ParamsError for an override of none of these sections and settings, which would have no effect on `reader`,
    unless the others cannot be without it: sources of a new domain want rules, too."""
    read = dict.fromkeys((*settings, "profile", "runtime"))
    for assignment in overrides:
        key = f"{assignment.partition('=')[0]}."
        if not any(key.startswith(f"{name}.") or f"{name}.".startswith(key) for name in read):
            try:
                load_params(path, tuple(other for other in overrides if other != assignment))
            except ParamsError:
                continue
            raise ParamsError(f"--set {assignment}: no effect on {reader}.\nIt reads: {', '.join(read)}.")


def _place(path: Path, overrides: tuple[str, ...], item: Any) -> str:
    """The override that gave the wrong value, else one without which nothing is wrong, else the file."""
    keys = [assignment.partition("=")[0] for assignment in overrides]
    location = ".".join(map(str, item["loc"]))
    for key in reversed(keys):
        if f"{location}.".startswith(f"{key}."):
            return f"--set {key}"
    for assignment in reversed(overrides):
        with suppress(ParamsError, ValidationError):
            _checked(path, (other for other in overrides if other != assignment))
            return f"--set {assignment}"
    return str(path)


def _explain(place: str, item: Any) -> str:
    """Two lines for one pydantic error: what is wrong, what to do."""
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"][:-1]), n=1)
        hint = f"Did you mean `{close[0]}`?" if close else "Remove it."
        return f"{place}: unknown key `{location}`.\n{hint}"
    if item["type"] == "missing":
        return f"{place}: `{location}` is missing.\nAdd it; profiles/ has examples."
    message, _, remedy = item["msg"].removeprefix("Value error, ").partition("\n")
    if isinstance(item["input"], dict):                 # the message names the fields
        return f"{place}: {f'`{location}`: ' * bool(location)}{message}.\n{remedy or 'Correct the value.'}"
    return f"{place}: `{location}`: {message} (got {item['input']!r:.80}).\n{remedy or 'Correct the value.'}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at `location`."""
    section: Any = Params
    for part in location:
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = section.model_fields[part].annotation if part in section.model_fields else None
        elif get_origin(section) in (dict, list):
            section = get_args(section)[-1]
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
