"""Triton's interpreter, quicker: what it makes or looks for anew with each value of a kernel, it does once.

Only where kernels are interpreted (triton_device.py): the compiler has the same types of tensors and blocks, and cannot
do with these.
"""

import functools
from collections.abc import Callable
from typing import Any

from triton import language
from triton.runtime import interpreter

replace = interpreter._patch_lang


def replace_once(function: Callable[..., Any]) -> interpreter._LangPatchScope:
    """The interpreter looks through all of the language for what to replace, at every function that a kernel calls: a
    quarter of its time. What the kernel has replaced already needs no second look."""
    languages = [value for value in function.__globals__.values() if value is language or value is language.core]
    if languages and not any(language.core.is_builtin(found.load) for found in languages):
        return interpreter._LangPatchScope()
    return replace(function)


interpreter._patch_lang = replace_once

# What the interpreter makes anew for each value of a kernel: NumPy's types in a table, a type of its block, constants
# that are its shape.
numpy_type = functools.cache(interpreter._get_np_dtype)
make_tensor = language.tensor.__init__


@functools.cache
def block_type(scalar: language.dtype, *sizes: int) -> language.block_type:
    return language.block_type(scalar, list(sizes))


@functools.cache
def shape_and_numel(*sizes: int) -> tuple[language.tuple, language.constexpr]:
    made = object.__new__(language.tensor)
    make_tensor(made, None, block_type(language.int1, *sizes) if sizes else language.int1)
    return made.shape, made.numel


def tensor_of_kept_shape(self: language.tensor, handle: interpreter.TensorHandle, of: language.dtype) -> None:
    self.handle, self.type, self.dtype = handle, of, of.scalar
    self.shape, self.numel = shape_and_numel(*(of.shape if of.is_block() else ()))


language.pointer_type.__hash__ = language.dtype.__hash__        # which it loses with an equality of its own
interpreter._get_np_dtype = lambda of: numpy_type(of.scalar)
language.tensor.__init__ = tensor_of_kept_shape
language.block_type.with_element_ty = lambda self, scalar: block_type(scalar, *self.shape)
language.block_type.to_ir = lambda self, builder: self
# Of no effect without `debug`: sums of integers are computed once more in 64 bits, and nobody is told.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
