"""Operations with a derivative of their own, and what autograd and autocast must not do to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function as it is outside of torch.autocast, which would have its products, and no more of it, in another
    dtype than the tensors it is given."""
    @wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        device = next(one.device.type for one in (*arguments, *named.values()) if isinstance(one, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **named)

    return run


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of what has no second derivative. PyTorch's decorator of that name refuses one only where the
    gradient that comes in needs a gradient itself, as a loss's does not, and lets it pass as zero elsewhere."""
    backward = outside_autocast(backward)

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("The kernels are differentiable once: create_graph=True asks for more.\n"
                               "Take second derivatives of PyTorch's own operations.")
        return backward(ctx, *gradients)

    return run


class Operation:
    """A function of tensors that changes none of them, with a derivative: where gradients are asked for an
    autograd.Function of it, else the function itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = self._differentiable = function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As that of `torch.library.custom_op`."""
        function = self.function

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        differentiable: Any = type(function.__name__, (torch.autograd.Function,), members)
        self._differentiable = differentiable.apply

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        return (self._differentiable if torch.is_grad_enabled() else self.function)(*arguments)
