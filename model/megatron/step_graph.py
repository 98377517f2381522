"""Forward and backward of a whole step as one CUDA graph: the GPU replays it, Python launches nothing.

A hybrid layer is some tens of launches, and below about 16k tokens of a small model the launches take longer than the
work. The graph holds every micro-batch's forward and backward and the reduction of the gradients; the optimizer, which
reads the norm of the gradients back, runs after it. Everything a replay touches stays where it was: the batch in a
buffer of this module, weights, and the gradient buffers of Megatron's DDP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model.megatron.compat import forget_quantized_weights

EAGER_STEPS = 2         # compile kernels, open communicators, fill caches: a capture may do none of it


class StepGraph:
    """Runs a step as Python would for `EAGER_STEPS` calls, then captures it and replays it.

    The model must be wrapped in DDP within `on_stream`: autograd accumulates a gradient on the stream DDP's hook was
    made on, and a capture cannot reach the default one.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor], list[Tensor]]):
        """`run` takes a batch on the GPU, of one shape always, computes gradients of `model` and returns losses; it
        must not wait for the GPU."""
        self.model, self.run = model, run
        self.stream = torch.cuda.Stream()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """The stream for the block, in order with what comes before and after."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def __call__(self, batch: Tensor) -> list[Tensor]:
        """Losses of `batch`, valid until the next call."""
        if self.calls == 0:
            self.batch = torch.empty_like(batch, device="cuda")
        self.batch.copy_(batch, non_blocking=True)
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            with self.on_stream():
                return self.run(self.batch)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            forget_quantized_weights(self.model)
            torch.cuda.synchronize()
            # Other threads, NCCL's watchdog among them, may go on asking the GPU.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.losses = self.run(self.batch)
            forget_quantized_weights(self.model)
        self.graph.replay()
        return self.losses

    def close(self) -> None:
        """Give the graph back: a process group does not close while a graph holds its collectives."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None
