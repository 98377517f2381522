"""Geometry of hybrid models and of their pretraining, typed and checked.

A model is a pattern string, one symbol a layer: `M` Mamba-2, `*` self-attention, `-` feed-forward (paper Table 1,
Figure 2). The Transformer baseline is the same thing with the pattern `*-*-...` and RoPE.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

PADDING = 1024              # ids a model may have beyond its tokenizer's: vocabularies are rounded up


class ModelError(ValueError):
    """A model, checkpoint or recipe that cannot be used here. Its text is two lines: what is wrong, what to do."""


def first_problem(error: ValidationError) -> str:
    """Of values that are no configuration, the first field that is wrong, and why, in one line."""
    item = error.errors()[0]
    where = ".".join(map(str, item["loc"])) or "geometry"
    return f"{where}: {item['msg'].removeprefix('Value error, ').partition(chr(10))[0].rstrip('.')}"


Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Settings: an unknown key is an error, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Record(BaseModel):
    """What a stage writes and the report reads back: a field that is missing or unknown means another version."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Geometry(Section):
    """Widths of a model without its vocabulary. All sizes are counts of channels, heads or tokens."""

    pattern: str
    hidden_size: int = Field(ge=1, le=2**20)        # so that no product of them overflows
    ffn_hidden_size: int = Field(ge=1, le=2**24)
    num_attention_heads: int = Field(ge=1, le=2**16)
    num_query_groups: int = Field(ge=1)
    head_dim: int = Field(ge=1, le=2**16)
    mamba_num_heads: int = Field(default=0, ge=0, le=2**16)
    mamba_head_dim: int = Field(default=0, ge=0, le=2**16)
    mamba_state_dim: int = Field(default=0, ge=0, le=2**16)
    mamba_num_groups: int = Field(default=1, ge=1)
    conv_kernel: int = Field(default=4, ge=2, le=2**10)
    chunk_size: int = Field(default=128, ge=1)
    position_embedding: Literal["none", "rope"] = "none"
    rope_theta: FiniteFloat = Field(default=10_000.0, gt=0)
    norm_epsilon: FiniteFloat = Field(default=1e-5, gt=0)
    init_method_std: FiniteFloat = Field(default=0.02, gt=0)
    sequence_length: int = Field(ge=1)

    @field_validator("pattern")
    @classmethod
    def pattern_is_layers(cls, pattern: str) -> str:
        """Raise ValueError for an empty pattern or a symbol that is no kind of layer."""
        if not pattern:
            raise ValueError("a model needs at least one layer\nWrite a symbol a layer: M Mamba-2, * attention, - FFN.")
        for layer, symbol in enumerate(pattern):
            if symbol not in "M*-":
                raise ValueError(
                    f"layer {layer} of the pattern is '{symbol}', which is no kind of layer\n"
                    "Write a symbol a layer: M Mamba-2, * attention, - FFN."
                )
        return pattern

    @model_validator(mode="after")
    def widths_fit_together(self) -> Geometry:
        """Raise ValueError where heads are no multiple of groups, or a pattern with M lacks its widths."""
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_query_groups ({self.num_query_groups})\nEvery group serves the same number of heads: change one."
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) is odd, rotary positions turn pairs\nMake it even.")
        if "M" in self.pattern:
            if not (self.mamba_num_heads and self.mamba_head_dim and self.mamba_state_dim):
                raise ValueError(
                    "a pattern with M needs mamba_num_heads, mamba_head_dim and mamba_state_dim\n"
                    "Set them; the paper has 2 x hidden_size / 64 heads of 64, and states of 128 or 256."
                )
            if self.mamba_num_heads % self.mamba_num_groups:
                raise ValueError(
                    f"mamba_num_heads ({self.mamba_num_heads}) must be a multiple of "
                    f"mamba_num_groups ({self.mamba_num_groups})\n"
                    "Every group serves the same number of heads: change one."
                )
        return self


class ModelConfig(Geometry):
    """A whole model: geometry and vocabulary."""

    vocab_size: int = Field(ge=1, le=2**31 - 1)

    @property
    def mamba_inner_size(self) -> int:
        """Channels of a Mamba-2 layer's x and z."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels the causal convolution runs over: x, B and C."""
        return self.mamba_inner_size + 2 * self.mamba_num_groups * self.mamba_state_dim

    @property
    def in_proj_size(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return self.mamba_inner_size + self.conv_channels + self.mamba_num_heads

    @property
    def attention_size(self) -> int:
        """Channels of the queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys, and of the values."""
        return self.num_query_groups * self.head_dim


def check_tensor_split(config: ModelConfig, tensor: int, sequence: bool = False) -> None:
    """Raise ModelError where heads, groups, widths or vocabulary do not divide among `tensor` processes; with
    `sequence` the sequence neither."""
    split = {"num_attention_heads": config.num_attention_heads, "num_query_groups": config.num_query_groups,
             "ffn_hidden_size": config.ffn_hidden_size, "vocab_size": config.vocab_size}
    if "M" in config.pattern:
        split |= {"mamba_num_heads": config.mamba_num_heads, "mamba_num_groups": config.mamba_num_groups}
    if sequence:
        split |= {"sequence_length": config.sequence_length}
    for name, value in split.items():
        if value % tensor:
            raise ModelError(
                f"model: {name} ({value}) cannot be split over {tensor} tensor-parallel processes.\n"
                f"Choose a tensor-parallel size that divides it."
            )


class ScheduleConfig(Section):
    """Batches and rates of a training run."""

    global_batch_size: int = Field(ge=1)            # sequences a step
    micro_batch_size: int = Field(ge=1)             # of them at once
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(ge=0)
    warmup_fraction: float = Field(ge=0, lt=1)
    checkpoint_every: int = Field(ge=1)             # steps

    @model_validator(mode="after")
    def batches_divide_and_rate_falls(self) -> Self:
        """Raise ValueError unless a batch is a whole number of micro-batches and the rate falls."""
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) must not exceed learning_rate ({self.learning_rate})\n"
                "The rate falls from one to the other: lower the first."
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})\nA batch is a whole number of micro-batches: change one."
            )
        return self


class PretrainConfig(ScheduleConfig):
    """The paper's recipe (section 2.3, 2.4): cosine schedule, AdamW, FP8 with BF16 ends.

    Attributes:
        decay_style: `cosine` from the end of warm-up to the last step (the paper), or `minus_sqrt` over the last
            `decay_fraction` of the steps after a stable rate (WSD, arXiv 2405.18392), as its siblings.
        bf16_layers_at_start, bf16_layers_at_end: pattern symbols that stay in BF16 under FP8.
        validation_micro_batch_size: the most sequences a forward pass of validation takes; null: micro_batch_size.
        spike_factor: a gradient norm above this multiple of the running median is reported as a spike.
        max_skipped_steps: updates in a row that may be skipped because loss or gradient are not finite.
        distributed_optimizer: whether data-parallel GPUs share master weights and moments among them.
        grad_reduce_in_fp32: whether gradients are added up over micro-batches and replicas in FP32, else in BF16: half
            the memory and traffic, and less exact with every micro-batch.
        fp8_recipe: where an FP8 tensor's scale comes from: its `current` maximum, or nowhere (`unscaled`), a control.
        fp8_gradients: format of gradients; weights and activations are E4M3.
        fp8_statistics: whether evaluations also write what FP8 does to every linear layer's tensors.
        checkpoints_kept: resume states kept, the latest included; a damaged one leaves the one before.
        recompute: symbols of the layers whose activations the backward computes again instead of keeping them.
        cuda_graph: whether a GPU replays forward and backward of a step as one CUDA graph; for one pipeline stage.
        reset_at_documents: whether state, convolution and attention restart at an end-of-document token.
        check_kernels: whether a GPU's kernels are compared with float64 at this run's sizes, and must have the same
            bits each time, before the first step.
    """

    tokens: int = Field(ge=1)
    decay_style: Literal["cosine", "minus_sqrt"]
    decay_fraction: float | None = Field(default=None, gt=0, le=1)
    weight_decay: float = Field(ge=0)
    adam_betas: tuple[Beta, Beta]
    clip_grad: float = Field(gt=0)
    bf16_layers_at_start: int = Field(ge=0)
    bf16_layers_at_end: int = Field(ge=0)
    evaluations: int = Field(ge=1)
    checkpoints_kept: int = Field(default=2, ge=1)
    validation_micro_batch_size: int | None = Field(default=None, ge=1)
    spike_factor: float = Field(default=10.0, gt=1)
    max_skipped_steps: int = Field(default=10, ge=1)
    distributed_optimizer: bool = False
    grad_reduce_in_fp32: bool = True
    fp8_recipe: Literal["current", "unscaled"] = "current"
    fp8_gradients: Literal["e5m2", "e4m3"] = "e5m2"
    fp8_statistics: bool = False
    recompute: str = Field(default="", pattern=r"^[M*\-]*$")
    cuda_graph: bool = False
    reset_at_documents: bool = False
    check_kernels: bool = True

    @model_validator(mode="after")
    def decay_has_its_fraction(self) -> PretrainConfig:
        """Raise ValueError where the schedule's fractions contradict one another or its style."""
        if self.decay_style == "cosine" and self.decay_fraction is not None:
            raise ValueError(
                f"decay_fraction ({self.decay_fraction}) with decay_style cosine, which falls over the whole run\n"
                "Set decay_fraction to null, or decay_style to minus_sqrt."
            )
        if self.decay_style == "minus_sqrt" and self.decay_fraction is None:
            raise ValueError(
                "decay_style minus_sqrt without decay_fraction\n"
                "Say over which last part of the steps the rate falls, for example 0.15."
            )
        if self.warmup_fraction + (self.decay_fraction or 0) > 1:
            raise ValueError("warmup_fraction + decay_fraction must not exceed 1\nShorten one of them.")
        return self

    def fp8_layers(self, layers: int) -> range:
        """Of `layers` layers, those whose linear layers an FP8 run computes in FP8."""
        return range(self.bf16_layers_at_start, layers - self.bf16_layers_at_end)

    def overlaps_gradients(self, replicas: int) -> bool:
        """Whether gradients travel between replicas while the last micro-batch's backward goes on. With `cuda_graph`
        they travel after it."""
        return replicas > 1 and not self.cuda_graph
