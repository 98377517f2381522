"""What a training run or a distillation will take before it is started: memory of a GPU by part, time of a step, days,
GPU-hours.

Closed forms over `model.config` and a layout. Memory counts what the trainer holds: every tensor that the layers of
`model.megatron.spec` keep for the backward, by its shape and type. Time adds, for every operation, the larger of what
its arithmetic and its bytes need at the rates a machine reaches, and what travels between GPUs. `benchmarks.plan_gpu`
holds both against measured runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from model import costs
from model.config import ModelConfig, ModelError, PretrainConfig
from model.costs import layer_parameters, parameters, training_flops_per_token

if TYPE_CHECKING:
    from model.megatron.distributed import Parallelism

GIB = 2**30
BF16, FP32, FP8 = 2, 4, 1               # bytes
SCAN_CHUNK = 128                        # tokens between the states that `kernels.ssd.triton` keeps


@dataclass(frozen=True)
class Machine:
    """Rates that one GPU and its neighbours reach, not those of a data sheet but for `peak`.

    Attributes:
        memory: bytes of a GPU.
        reserved: of them, what CUDA, its libraries and NCCL take for themselves.
        bf16, fp8: operations a second of a large matrix product.
        copy: bytes a second, read and written, of a large copy.
        link: bytes a second a GPU sends to others of its node, as bus bandwidth.
        network: bytes a second a GPU sends to other nodes.
        launch_seconds: of Python and driver, for the forward and backward of a layer.
        peak: BF16 operations a second of the data sheet, for model FLOP utilization.
    """

    name: str
    memory: float
    bf16: float
    fp8: float
    copy: float
    reserved: float = 2.0 * GIB
    link: float = 3.4e11
    network: float = 4.5e10
    gpus_per_node: int = 8
    launch_seconds: float = 2.5e-3
    peak: float = 989.4e12


MACHINES = {
    "h100": Machine("H100 SXM", 79.6 * GIB, bf16=690e12, fp8=1250e12, copy=2.95e12),
    "h200": Machine("H200 SXM", 139.8 * GIB, bf16=720e12, fp8=1300e12, copy=4.2e12),
}


def machine_here() -> Machine:
    """This process's GPU: its memory, and the rates of the kind that it is of, of an H100 where that is not known."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return replace(MACHINES["h200" if "H200" in found.name else "h100"], name=found.name, memory=found.total_memory)


# Share of the copy's rate that kernels reach, forward and backward together (docs/results/kernels-h200.md).
STREAMING = 0.8
ATTENTION, ATTENTION_HEAD = 0.65, 128    # of the BF16 rate, cuDNN, heads of 128
# Seconds a token and inner channel of the scan take where a copy runs at 4.17 TB/s and a state is 128 wide.
SCAN_SECONDS, SCAN_COPY, SCAN_STATE = 1.27e-3 / 8192 / 8192, 4.17e12, 128
BACKWARD = 2 / 3                # of a micro-batch's time
FORWARD_TRIPS = 2               # a layer's gather and scatter, or its all-reduce
# A product whose smallest size is s runs at s / (s + RAMP) of the rate.
RAMP = 100
# Bytes a logit of the loss, forward and backward, with all of the vocabulary and where tensor ranks each have a part
# (there in FP32, pass by pass). Of a divergence (`training.distillation`) they are those of both models' logits.
LOSS_BYTES, KL_BYTES = (6, 30), (14, 150)
# Megatron sends gradients in buckets of so many weights, or so many times the replicas where that is more.
BUCKET, BUCKET_A_REPLICA = 40e6, 1e6


class Layout(NamedTuple):
    """How a model lies on GPUs; what is not tensor or pipeline parallel is data parallel.

    Attributes:
        tensor_overlap, fp8_weights: of NVIDIA's setup (`nvidia_setup`), not of this trainer: tensor ranks exchange
            pieces while products run (user buffers); weights of FP8 layers exist in FP8 alone.
    """

    processes: int = 1
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    distributed_optimizer: bool = False
    micro_batch_size: int = 1
    recompute: str = ""
    tensor_overlap: bool = False
    fp8_weights: bool = False

    @property
    def data(self) -> int:
        """Data-parallel copies."""
        return self.processes // (self.tensor * self.pipeline)

    @property
    def parallelism(self) -> Parallelism:
        """As the engine has it."""
        from model.megatron.distributed import Parallelism

        return Parallelism(self.tensor, self.pipeline, self.sequence)

    def changes(self, other: Layout) -> int:
        """How many settings differ."""
        return sum(a != b for a, b in zip(self, other, strict=True))

    def __str__(self) -> str:
        return (f"tensor {self.tensor}{' + sequence' if self.sequence else ''}, pipeline {self.pipeline}, "
                f"data {self.data}, micro-batch {self.micro_batch_size}, "
                f"recompute {self.recompute or 'nothing'}, "
                f"{'distributed' if self.distributed_optimizer else 'whole'} optimizer")


class TrainingMemory(NamedTuple):
    """Bytes on the fullest GPU."""

    weights: float              # BF16
    fp8_copies: float           # of weights, each in two orders
    gradients: float            # FP32, or BF16
    optimizer: float            # master weights and two moments, FP32
    activations: float
    logits: float               # and what the loss keeps of them
    workspace: float            # of the backward: gradients on their way, one layer recomputed
    reserved: float
    teacher: float = 0.0        # of a distillation: its weights, logits and hidden states on their way

    @property
    def allocated(self) -> float:
        """What PyTorch holds at most."""
        return sum(self) - self.reserved

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self)


class Time(NamedTuple):
    """Seconds of a step on one GPU."""

    layers: float               # arithmetic and memory traffic of the layers
    head: float                 # logits and loss
    update: float               # gradients into FP32, norm, AdamW
    tensor_parallel: float      # what travels within a layer
    pipeline: float             # stages that wait, and what travels between them
    data_parallel: float        # gradients and weights between replicas, as far as they are waited for
    teacher: float = 0.0        # of a distillation: its forward pass

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self)


@dataclass(frozen=True)
class Plan:
    """What a run takes: bytes of a GPU, seconds of a step. With a `teacher` it is a distillation."""

    config: ModelConfig
    recipe: PretrainConfig
    fp8: bool
    layout: Layout
    machine: Machine
    memory: TrainingMemory
    time: Time
    teacher: ModelConfig | None = None

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory holds it."""
        return self.memory.total <= self.machine.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.recipe.global_batch_size * self.config.sequence_length / self.time.total

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.recipe.tokens / self.tokens_per_second / 86_400

    @property
    def gpu_hours(self) -> float:
        """Of the whole run, all GPUs."""
        return self.days * 24 * self.layout.processes

    @property
    def utilization(self) -> float:
        """Model FLOP utilization against BF16's peak."""
        rate = training_flops_per_token(self.config) * self.tokens_per_second
        return rate / (self.layout.processes * self.machine.peak)


def plan(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, machine: Machine,
    teacher: ModelConfig | None = None,
) -> Plan:
    """Memory and time of `recipe` under `layout`; with a `teacher` of its distillation.

    Raises:
        ModelError: sizes that the layout cannot split or FP8 cannot multiply, or a step that cannot be captured.
    """
    from model.megatron.limits import check_cuda_graph, check_fp8_sizes
    from model.megatron.precision import Precision

    precision = Precision("fp8" if fp8 else "bf16", recipe.bf16_layers_at_start, recipe.bf16_layers_at_end)
    for model in filter(None, (config, teacher)):
        check_layout(model, layout, machine)
        if fp8:
            check_fp8_sizes(model, precision, layout.tensor)
    check_cuda_graph(recipe, layout.parallelism)
    if recipe.global_batch_size % (layout.micro_batch_size * layout.data):
        raise ModelError(
            f"global_batch_size ({recipe.global_batch_size}) is not a multiple of micro_batch_size "
            f"({layout.micro_batch_size}) x {layout.data} data-parallel replicas.\nChange one of them in "
            f"{'compress' if teacher else 'pretrain'}, or runtime.launcher."
        )
    return Plan(config, recipe, fp8, layout, machine, memory(config, recipe, fp8, layout, machine, teacher),
                step_time(config, recipe, fp8, layout, machine, teacher), teacher)


def nvidia_setup(recipe: PretrainConfig, fp8: bool, layout: Layout) -> tuple[PretrainConfig, bool, Layout]:
    """The same as NVIDIA's performance recipe of Nemotron-H-56B runs it (Megatron-Bridge, scripts/performance, 25.11):
    user buffers, `fp8_param_gather`, `grad_reduce_in_fp32` off, no layer in BF16."""
    changes = {"grad_reduce_in_fp32": False, "bf16_layers_at_start": 0, "bf16_layers_at_end": 0}
    return recipe.model_copy(update=changes), fp8, layout._replace(tensor_overlap=True, fp8_weights=True)


def nearest_that_fits(wanted: Plan) -> Plan | None:
    """Of the layouts of as many GPUs that fit, one with the fewest settings changed; of those, the fastest."""
    found = []
    for layout in alternatives(wanted.layout, len(wanted.config.pattern)):
        try:
            other = plan(wanted.config, wanted.recipe, wanted.fp8, layout, wanted.machine, wanted.teacher)
        except ModelError:
            continue
        if other.fits:
            found.append((wanted.layout.changes(layout), other.time.total, other))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def alternatives(layout: Layout, layers: int) -> Iterator[Layout]:
    """Layouts of as many GPUs for a model of `layers` layers; not all of them can be."""
    pipelines = [stages for stages in range(1, layers + 1) if layers % stages == 0]
    micro_batches = [size for size in range(1, layout.micro_batch_size + 1) if layout.micro_batch_size % size == 0]
    for tensor, pipeline, size, recompute in product((1, 2, 4, 8), pipelines, micro_batches, ("", "-", "M-", "M*-")):
        if layout.processes % (tensor * pipeline) == 0:
            changed = layout._replace(tensor=tensor, sequence=tensor > 1, pipeline=pipeline, micro_batch_size=size,
                                      recompute=recompute)
            yield changed._replace(distributed_optimizer=layout.distributed_optimizer or changed.data > 1)


def check_layout(config: ModelConfig, layout: Layout, machine: Machine) -> None:
    """Raise ModelError where `layout` cannot split the model."""
    from model.megatron.limits import check_split

    if layout.processes % (layout.tensor * layout.pipeline):
        raise ModelError(f"{layout.processes} GPUs are not a multiple of tensor {layout.tensor} x pipeline "
                         f"{layout.pipeline}.\nChange runtime.parallel or runtime.launcher.")
    if layout.tensor > machine.gpus_per_node:
        raise ModelError(f"tensor parallelism over {layout.tensor} GPUs leaves a node of {machine.gpus_per_node}.\n"
                         "Choose runtime.parallel.tensor within a node.")
    check_split(config, layout.parallelism)


# memory

def memory(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, machine: Machine,
    teacher: ModelConfig | None = None,
) -> TrainingMemory:
    """Bytes on the fullest pipeline stage."""
    return max((_stage_memory(config, recipe, fp8, layout, machine, teacher, stage)
                for stage in range(layout.pipeline)), key=lambda memory: memory.total)


def _stage_memory(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, machine: Machine,
    teacher: ModelConfig | None, stage: int,
) -> TrainingMemory:
    tokens = layout.micro_batch_size * config.sequence_length
    share = layout.tensor if layout.sequence else 1
    last = stage == layout.pipeline - 1
    layers = _stage_layers(config, recipe, fp8, layout, stage)
    table = config.vocab_size * config.hidden_size / layout.tensor
    held, quantized = held_parameters(config, recipe, fp8, layout, stage)
    kept = [tokens * kept_bytes(config, symbol, in_fp8, layout) for symbol, in_fp8 in layers]
    residual = tokens * config.hidden_size * BF16 / share
    activations = sum(residual if symbol in layout.recompute else size
                      for (symbol, _), size in zip(layers, kept, strict=True))
    steps_ahead = min(layout.pipeline - stage, recipe.global_batch_size // (layout.micro_batch_size * layout.data))
    # Cross-entropy split over tensor ranks keeps an FP32 softmax; a divergence its gradient, in BF16.
    logits = tokens * config.vocab_size / layout.tensor * (
        2 * BF16 if teacher else BF16 if layout.tensor == 1 else BF16 + FP32)
    recomputed = max((size for (symbol, _), size in zip(layers, kept, strict=True) if symbol in layout.recompute),
                     default=0)
    # The backward of the head, while logits are there; or that of a layer, when they are gone.
    of_head = logits + table * BF16 + 2 * residual if last else 0
    of_layers = max(tokens * backward_bytes(config, symbol, layout) + layer_parameters(config, symbol) / layout.tensor
                    * BF16 for symbol in {symbol for symbol, _ in layers}) + recomputed
    return TrainingMemory(
        weights=(held - quantized * layout.fp8_weights) * BF16,
        fp8_copies=quantized * 2 * FP8,
        gradients=held * (FP32 if recipe.grad_reduce_in_fp32 else BF16),
        optimizer=held * 3 * FP32 / (layout.data if layout.distributed_optimizer else 1),
        activations=activations * steps_ahead + (2 * residual if last else 0),     # the final norm's
        logits=logits if last else 0,
        workspace=max(of_head, of_layers) - (logits if last else 0),
        reserved=machine.reserved if layout.processes > 1 else machine.reserved / 2,
        teacher=_teacher_memory(config, teacher, recipe, fp8, layout, stage, steps_ahead) if teacher else 0.0,
    )


def _teacher_memory(
    student: ModelConfig, teacher: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, stage: int,
    steps_ahead: int,
) -> float:
    """BF16 weights, FP8 copies in one order (no backward needs the other), logits; between pipeline stages what came
    in, both models' hidden states in one tensor, stays until the backward beside the student's own copy."""
    tokens = layout.micro_batch_size * teacher.sequence_length
    held, quantized = held_parameters(teacher, recipe, fp8, layout, stage)
    size = held * BF16 + quantized * FP8
    if stage == layout.pipeline - 1:
        size += tokens * teacher.vocab_size / layout.tensor * BF16
    if stage > 0:
        size += steps_ahead * tokens * (student.hidden_size + teacher.hidden_size) * BF16 / (
            layout.tensor if layout.sequence else 1)
    return size + forward_bytes(teacher, layout)


def held_parameters(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, stage: int
) -> tuple[float, float]:
    """Parameters that a GPU of a pipeline stage holds, and how many of them are of layers in FP8."""
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = _stage_layers(config, recipe, fp8, layout, stage)
    sizes = [(layer_parameters(config, symbol) / layout.tensor, in_fp8) for symbol, in_fp8 in layers]
    ends = config.vocab_size * config.hidden_size / layout.tensor * (first + last)
    return (sum(size for size, _ in sizes) + ends + (config.hidden_size if last else 0),
            sum(size for size, in_fp8 in sizes if in_fp8))


def forward_bytes(config: ModelConfig, layout: Layout) -> float:
    """What the largest layer makes of a micro-batch without gradients, at most: what it would keep for them."""
    tokens = layout.micro_batch_size * config.sequence_length
    return max(tokens * kept_bytes(config, symbol, False, layout) for symbol in set(config.pattern))


def _stage_layers(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, stage: int
) -> list[tuple[str, bool]]:
    """Symbol of each layer of a stage, and whether it computes in FP8."""
    layers = len(config.pattern)
    in_fp8 = recipe.fp8_layers(layers)
    count = layers // layout.pipeline
    indices = range(stage * count, (stage + 1) * count)
    return [(config.pattern[index], fp8 and index in in_fp8) for index in indices]


def kept_bytes(config: ModelConfig, symbol: str, fp8: bool, layout: Layout) -> float:
    """Bytes a token of what a layer keeps for its backward, its input included.

    Before each projection stand the layer's input, which the norm keeps, and the normed input, which the projection
    keeps: in BF16, or as the FP8 copy that the gradient of the weights needs.
    """
    split, share = layout.tensor, layout.tensor if layout.sequence else 1
    operand = FP8 if fp8 else BF16
    entry = config.hidden_size * (BF16 + operand) / share
    if symbol == "M":
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        states = inner * config.mamba_state_dim / SCAN_CHUNK
        scan = config.in_proj_size + config.conv_channels + inner + states      # projected, convolved, scanned
        return entry + (scan * BF16 + 2 * heads * FP32 + inner * operand) / split
    if symbol == "*":
        turned = config.attention_size + config.kv_size if config.position_embedding == "rope" else 0
        qkv = config.attention_size + 2 * config.kv_size + turned
        return entry + ((qkv + config.attention_size) * BF16 + config.num_attention_heads * FP32
                        + config.attention_size * operand) / split
    return entry + config.ffn_hidden_size * (BF16 + operand) / split


def backward_bytes(config: ModelConfig, symbol: str, layout: Layout) -> float:
    """Bytes a token of what a layer's backward makes on its way."""
    split = layout.tensor
    residual = 2 * config.hidden_size * BF16
    if symbol == "M":
        inner = config.mamba_inner_size
        states = inner * config.mamba_state_dim / SCAN_CHUNK
        return residual + (config.in_proj_size + config.conv_channels + 2 * inner + states) * BF16 / split
    if symbol == "*":
        return residual + 2 * (2 * config.attention_size + 2 * config.kv_size) * BF16 / split
    return residual + 2 * config.ffn_hidden_size * BF16 / split


# time

def step_time(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, machine: Machine,
    teacher: ModelConfig | None = None,
) -> Time:
    """Seconds of a step. Between replicas gradients travel while the last micro-batch's backward goes on, but for the
    last bucket, and weights while the first's forward does, but for the first; nothing else overlaps: that is how the
    trainer runs."""
    tokens = layout.micro_batch_size * config.sequence_length
    micro_batches = recipe.global_batch_size // (layout.micro_batch_size * layout.data)
    held = parameters(config) / layout.tensor / layout.pipeline
    layers = _layers_seconds(config, recipe, fp8, layout, machine)
    head = _product_seconds(tokens, config.hidden_size, config.vocab_size / layout.tensor, False, machine)
    loss = (KL_BYTES if teacher else LOSS_BYTES)[layout.tensor > 1]
    head += stream_seconds(tokens * config.vocab_size / layout.tensor * loss, machine)
    gradient = FP32 if recipe.grad_reduce_in_fp32 else BF16
    accumulate = stream_seconds((2 * BF16 + 2 * gradient) * held, machine)     # written, read, added up
    optimizer = held / (layout.data if layout.distributed_optimizer else 1)
    update = stream_seconds(gradient * held + 46 * optimizer, machine)
    trips = 5 if layout.sequence else 4                     # gathers and scatters of a layer, forward and backward
    tensor_parallel = _tensor_seconds(config, trips, layout, machine)
    if layout.tensor_overlap:       # a ring in as many pieces as ranks: one piece has no product beside it
        tensor_parallel = max(tensor_parallel - layers, tensor_parallel / layout.tensor)
    watching = 0.0
    if teacher:
        watching = forward_seconds(teacher, recipe, fp8, layout, machine)
        watching += head_seconds(teacher, layout, machine) / layout.pipeline
    one = layers + head / layout.pipeline + accumulate + tensor_parallel + watching
    inside = layout.processes <= machine.gpus_per_node
    wire = machine.link if inside else machine.network
    width = config.hidden_size + (teacher.hidden_size if teacher else 0)
    between = 2 * tokens * width * BF16 / (layout.tensor if layout.sequence else 1) / wire
    waiting = (layout.pipeline - 1) * (one + between) + (micro_batches * between if layout.pipeline > 1 else 0)
    replica = (layout.data - 1) / layout.data * held
    gradients = replica * gradient * (1 if layout.distributed_optimizer else 2) / wire
    weights = replica * (FP8 if layout.fp8_weights else BF16) * layout.distributed_optimizer / wire
    if recipe.overlaps_gradients(layout.data):
        bucket = min(1.0, max(BUCKET, BUCKET_A_REPLICA * layout.data) / held)
        micro_batch = layers + head / layout.pipeline + tensor_parallel
        gradients = max(gradients - BACKWARD * micro_batch, gradients * bucket)
        weights = max(weights - (1 - BACKWARD) * micro_batch, weights * bucket)
    return Time(
        layers=micro_batches * layers, head=micro_batches * head / layout.pipeline,
        update=micro_batches * accumulate + update, tensor_parallel=micro_batches * tensor_parallel, pipeline=waiting,
        data_parallel=gradients + weights, teacher=micro_batches * watching,
    )


def forward_seconds(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, machine: Machine
) -> float:
    """Of a micro-batch's forward pass through the slowest pipeline stage, what travels within its layers included."""
    layers = _layers_seconds(config, recipe, fp8, layout._replace(recompute=""), machine)
    return (1 - BACKWARD) * layers + _tensor_seconds(config, FORWARD_TRIPS, layout, machine)


def head_seconds(config: ModelConfig, layout: Layout, machine: Machine) -> float:
    """Of a micro-batch's logits."""
    tokens = layout.micro_batch_size * config.sequence_length
    return _product_seconds(tokens, config.hidden_size, config.vocab_size / layout.tensor, False, machine) / 3


def inference_seconds(config: ModelConfig, tokens: float, machine: Machine, tensor: int = 1) -> float:
    """Of forward passes in BF16 over `tokens` tokens on `tensor` GPUs, in full sequences, logits of all of them."""
    alone, layout = PretrainConfig.model_construct(bf16_layers_at_start=0, bf16_layers_at_end=0,
                                                   cuda_graph=False), Layout(tensor, tensor)
    one = forward_seconds(config, alone, False, layout, machine) + head_seconds(config, layout, machine)
    return tokens / config.sequence_length * one


def writing_seconds(config: ModelConfig, tokens: float, context: int, machine: Machine, tensor: int = 1) -> float:
    """Of `tokens` tokens that one sequence after another is gone on with at `context` tokens, on `tensor` GPUs: weights
    and caches are read for each, what travels is not counted."""
    held = costs.memory(config, costs.Deployment.of(context))
    return tokens * stream_seconds((held.total + held.ssm_state + held.conv_state) / tensor, machine)


def _layers_seconds(
    config: ModelConfig, recipe: PretrainConfig, fp8: bool, layout: Layout, machine: Machine
) -> float:
    """Forward and backward of a micro-batch through the slowest pipeline stage."""
    tokens = layout.micro_batch_size * config.sequence_length
    stages = [_stage_layers(config, recipe, fp8, layout, stage) for stage in range(layout.pipeline)]
    seconds = max(sum(_layer_seconds(config, symbol, in_fp8, tokens, layout, machine) for symbol, in_fp8 in stage)
                  for stage in stages)
    return seconds if recipe.cuda_graph else max(seconds, machine.launch_seconds * len(stages[0]))


def _tensor_seconds(config: ModelConfig, trips: int, layout: Layout, machine: Machine) -> float:
    """What travels `trips` times within every layer of a stage."""
    tokens = layout.micro_batch_size * config.sequence_length
    travels = tokens * config.hidden_size * BF16 * (layout.tensor - 1) / layout.tensor
    return trips * travels * len(config.pattern) / layout.pipeline / machine.link


def _layer_seconds(
    config: ModelConfig, symbol: str, fp8: bool, tokens: int, layout: Layout, machine: Machine
) -> float:
    """Forward and backward of a layer; a third more where it is recomputed."""
    split, hidden = layout.tensor, config.hidden_size
    share = layout.tensor if layout.sequence else 1
    # norm 10 bytes an element, residual additions 12
    seconds = stream_seconds(22 * tokens * hidden / share, machine)
    if symbol == "M":
        inner = config.mamba_inner_size / split
        seconds += _product_seconds(tokens, hidden, config.in_proj_size / split, fp8, machine)
        seconds += _product_seconds(tokens, inner, hidden, fp8, machine)
        # convolution, gated norm
        seconds += stream_seconds(tokens * (10 * config.conv_channels / split + 16 * inner), machine)
        width = 0.5 + 0.5 * config.mamba_state_dim / SCAN_STATE
        seconds += SCAN_SECONDS * tokens * inner * width * SCAN_COPY / machine.copy
    elif symbol == "*":
        attention = config.attention_size / split
        seconds += _product_seconds(tokens, hidden, attention + 2 * config.kv_size / split, fp8, machine)
        seconds += _product_seconds(tokens, attention, hidden, fp8, machine)
        # causal: half of the square; two products forward, five backward; half a head fills half a tensor core
        rate = ATTENTION * machine.bf16 * min(1.0, config.head_dim / ATTENTION_HEAD)
        seconds += 7 * tokens * config.sequence_length * attention / rate
        # queries, keys and values are split, transposed, joined again; rotary positions are read and written each way
        heads = attention + config.kv_size / split
        seconds += stream_seconds(tokens * (24 * (heads + config.kv_size / split)
                                             + (8 * heads if config.position_embedding == "rope" else 0)), machine)
    else:
        ffn = config.ffn_hidden_size / split
        seconds += _product_seconds(tokens, hidden, ffn, fp8, machine)
        seconds += _product_seconds(tokens, ffn, hidden, fp8, machine)
        seconds += stream_seconds((4 if fp8 else 10) * tokens * ffn, machine)         # activation
    return seconds * (4 / 3 if symbol in layout.recompute else 1)


def _product_seconds(rows: float, inner: float, columns: float, fp8: bool, machine: Machine) -> float:
    """The three products of a linear layer; in FP8 with the quantisation of both operands and the gradient."""
    smallest = min(rows, inner, columns)
    rate = (machine.fp8 if fp8 else machine.bf16) * smallest / (smallest + RAMP)
    seconds = 6 * rows * inner * columns / rate
    if fp8:         # each tensor read twice, for its maximum and to be cast, and written in two orders
        seconds += stream_seconds(6 * (rows * inner + rows * columns + inner * columns), machine)
    return seconds


def stream_seconds(size: float, machine: Machine) -> float:
    """Of `size` bytes read and written by a kernel that does little else."""
    return size / (STREAMING * machine.copy)
