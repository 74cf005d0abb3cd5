"""Triton's interpreter without work that changes nothing, which takes more than half of its time."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

from triton.runtime import interpreter

tl = interpreter.tl


def quicken() -> None:
    """Take that work from the interpreter of this process. Where a version of Triton is made otherwise, it stays as it is."""
    # each sum and product of int32 is computed in int64 once more, for an assertion that is never made without options.debug
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if options is not None and options.debug is False:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    # each call of one function by another replaces the language, as the launch has done
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = functools.partial(patch_once, interpreter._patch_lang)
    # each operation makes a dictionary of all types
    if hasattr(interpreter, "_get_np_dtype"):
        of_scalar = functools.cache(interpreter._get_np_dtype)
        pointer = interpreter._get_np_dtype(tl.pointer_type(tl.int8))
        interpreter._get_np_dtype = lambda dtype: pointer if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    # each operation creates the types and shapes of its operands and results again
    semantic = type(getattr(interpreter, "interpreter_semantic", None))
    if "shape" in vars(tl.block_type(tl.int32, [1])) and hasattr(semantic, "broadcast_impl_value"):
        describe_once(semantic)


def describe_once(semantic: type) -> None:
    """Keep the descriptions of block types of numbers, and of the shapes of tensors; take operands of one shape as they are."""
    describe, broadcast, known = tl.block_type.__init__, semantic.broadcast_impl_value, {}

    def describe_block(self, element_ty, shape) -> None:
        if type(element_ty) is not tl.dtype:  # each operation creates its own pointer types
            return describe(self, element_ty, shape)
        key = element_ty.name, *[x.value if isinstance(x, tl.constexpr) else x for x in shape]
        if key not in known:
            describe(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    @functools.cache
    def sizes(shape: tuple[int, ...]) -> tuple:
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(n) for n in shape])

    def describe_tensor(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes(tuple(type.shape.values) if type.is_block() else ())

    def broadcast_others(self, a, b) -> tuple:
        return (a, b) if a.shape is b.shape else broadcast(self, a, b)

    tl.block_type.__init__, tl.tensor.__init__, semantic.broadcast_impl_value = (
        describe_block,
        describe_tensor,
        broadcast_others,
    )


def patch_once(patch: Callable, function: Callable):
    """Triton's function that replaces the language which `function` sees, unless it is replaced."""
    is_patched = all(not tl.core.is_builtin(language.load) for language in (tl, *languages(function)))
    return None if is_patched else patch(function)


@functools.cache
def languages(function: Callable) -> list:
    return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
