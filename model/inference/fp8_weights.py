"""A model whose layers read FP8 weights, for inference; embedding and head stay as they are, as in the paper's recipe
(section 2.4)."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.fp8_linear import RowScaled, fp8_linear, quantize_rows
from model.config import ModelError

MULTIPLE = 16               # of FP8 matrix products' sizes
# Hidden size from which FP8 weights are known to pay: an H200 decodes the 47B and the 56B at 0.89 and 0.85 of their
# bytes' floor. At 1,024 they are slower than BF16, a step by a third, a prompt by 38 %. Nothing between was measured.
LEAST_WIDTH = 8192


class FP8Linear(nn.Module):
    """In place of a layer's nn.Linear: E4M3 weight (outputs, inputs) and a scale an output."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        rows = quantize_rows(weight)
        self.register_buffer("weight", rows.values)
        self.register_buffer("scale", rows.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs) in x's dtype."""
        return fp8_linear(x, RowScaled(self.weight, self.scale))


def quantize_weights(module: nn.Module) -> None:
    """Replace the projections in `module`, a layer or several, by FP8 ones. It cannot be trained or saved any more.

    Raises ModelError for a width FP8 matrix products do not take.
    """
    for name, parent in list(module.named_modules()):
        for child, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            if any(size % MULTIPLE for size in linear.weight.shape):
                raise ModelError(
                    f"weights: {name}.{child} is {tuple(linear.weight.shape)}, FP8 wants multiples of {MULTIPLE}.\n"
                    "Use bfloat16 weights."
                )
            quantized = FP8Linear(linear.weight.detach())
            quantized._forward_hooks = linear._forward_hooks        # what travels between processes
            setattr(parent, child, quantized)
