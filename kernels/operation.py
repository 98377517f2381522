"""Operations that torch.compile takes as one node, and that cost eager mode none of the dispatcher's time; and what
autograd and autocast must not do to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

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
    """`torch.library.custom_op` of a function that mutates nothing; called without a compiler or another dispatch mode,
    the function itself and an autograd.Function of it: some 50 us less of Python a call.

    Attributes:
        registered: the custom operator.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = self._differentiable = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As the custom operator's."""
        backward = once_differentiable(backward)
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        differentiable: Any = type(function.__name__, (torch.autograd.Function,), members)
        self._differentiable = differentiable.apply

    def __call__(self, *arguments: Any) -> Any:
        """The function's result, by the way that costs least of the host's time here."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self.registered(*arguments)
        return (self._differentiable if torch.is_grad_enabled() else self.function)(*arguments)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Decorator: the function, with annotated arguments, as an `Operation` of that name ("library::name")."""
    return lambda function: Operation(name, function)
