"""Triton's interpreter without what takes three quarters of its time and changes no result:
conftest.py makes it so where kernels are interpreted.

It replaces the functions of triton.language at every launch and at every call of a helper; makes
types, shapes and constants anew for every operation, and promotes operands of one type; and
computes every sum and product of integers again in 64 bits, for an assertion that it then leaves
out.
"""

import types
from collections.abc import Callable

# Operands that need no promotion: types of elements, and those of Python numbers.
NUMBERS = {("int32", int), ("int64", int), ("fp32", float), ("fp64", float)}
SAME = {(name, name) for name in ("int1", "int32", "int64", "fp32", "fp64")}
SAME |= NUMBERS | {pair[::-1] for pair in NUMBERS}


def once(known: dict, key: object, make: Callable) -> object:
    if key not in known:
        known[key] = make()
    return known[key]


# From now on, for the whole process.
def hurry() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    core, tensor, block_type = tl.core, tl.core.tensor, tl.core.block_type
    semantic, find = interpreter.interpreter_semantic, interpreter._get_np_dtype
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    start_type, start, scalar = block_type.__init__, tensor.__init__, semantic.scalar_constant
    dtypes, blocks, shapes, constants = {}, {}, {}, {}

    def attach(obj, name, member, *_):
        call = getattr(member, "__wrapped__", member)
        setattr(obj, name, lambda *a, _semantic=None, **more: call(*a, **more, _semantic=semantic))

    def block(cls, element_ty, shape):
        sizes = (size if type(size) is int else size.value for size in shape)
        return once(blocks, (element_ty.name, *sizes), lambda: object.__new__(cls))

    def init(self, handle, kind):
        if kind.name not in shapes:
            start(self, handle, kind)
            shapes[kind.name] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[kind.name], handle=handle, type=kind, dtype=kind.scalar)

    def constant(value, dtype):
        def make():
            if not dtype.is_block():
                return scalar(value, dtype)
            return semantic.splat(constant(value, dtype.scalar), dtype.shape)

        return once(constants, (value, dtype.name), make)

    def same_type(lhs, rhs, *flags, **more):
        pair = [x.dtype.name if isinstance(x, tensor) else type(x) for x in (lhs, rhs)]
        if tuple(pair) not in SAME:
            return check(lhs, rhs, *flags, **more)
        kind = (lhs if isinstance(lhs, tensor) else rhs).type
        return same_shape(*(x if isinstance(x, tensor) else constant(x, kind) for x in (lhs, rhs)))

    def same_shape(lhs, rhs):
        return (lhs, rhs) if lhs.type is rhs.type else broadcast(lhs, rhs)

    interpreter._patch_attr = attach
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter._get_np_dtype = lambda kind: once(dtypes, kind.name, lambda: find(kind))
    block_type.__new__, tensor.__init__ = block, init
    block_type.__init__ = lambda self, *given: None if vars(self) else start_type(self, *given)
    semantic.scalar_constant, semantic.broadcast_impl_value = constant, same_shape
    semantic.binary_op_type_checking_impl = same_type
    interpreter.TensorHandle.__post_init__ = lambda self: None
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
