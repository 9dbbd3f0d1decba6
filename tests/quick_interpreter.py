"""Triton's interpreter without what takes three quarters of its time and changes no result:
conftest.py makes it so where kernels are interpreted.

The interpreter replaces the functions of triton.language at every launch and at every call of a
helper; makes types, shapes and constants anew for every operation, and promotes operands of one
type; takes ten calls to add two blocks; and computes every sum and product of integers again in 64
bits, for an assertion that it then leaves out.
"""

import types
from collections.abc import Callable

import numpy as np

# Operands that need no promotion: types of elements, and those of Python numbers.
NUMBERS = {("int32", int), ("int64", int), ("fp32", float), ("fp64", float)}
SAME = {(name, name) for name in ("int1", "int32", "int64", "fp32", "fp64")}
SAME |= NUMBERS | {pair[::-1] for pair in NUMBERS}

# The operations and element types of elementwise_in_numpy.
ELEMENTS = {"fp32": np.float32, "fp64": np.float64, "int32": np.int32, "int64": np.int64}
ARITHMETIC = {"__add__": np.add, "__sub__": np.subtract, "__mul__": np.multiply}
COMPARISONS = {"__lt__": np.less, "__le__": np.less_equal, "__gt__": np.greater}
COMPARISONS |= {"__ge__": np.greater_equal}


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
    elementwise_in_numpy()


# Compute sums, products, comparisons, fma and where in NumPy, where no operand is promoted.
def elementwise_in_numpy() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    core, tensor = tl.core, tl.core.tensor
    builder, handle = interpreter.interpreter_builder, interpreter.TensorHandle

    # (NumPy values, element type, type of the result) of such operands, None of others.
    def plain(*operands):
        element = shape = None
        values = []
        for x in operands:
            if type(x) is tensor:
                if element is None:
                    element = x.dtype
                elif x.dtype.name != element.name:
                    return None
                if x.type is not x.dtype and x.type is not shape:
                    if shape is not None:
                        return None
                    shape = x.type
        make = None if element is None else ELEMENTS.get(element.name)
        if make is None:
            return None
        for x in operands:
            if type(x) is core.constexpr:
                x = x.value
            if type(x) is tensor:
                values.append(x.handle.data)
            elif type(x) is int or type(x) is float and make in (np.float32, np.float64):
                values.append(make(x))
            else:
                return None
        return values, element, shape or element

    def elementwise(general, operation, compares):
        def call(self, other):
            given = plain(self, other)
            if given is None:
                return general(self, other)
            values, element, kind = given
            kind = kind.with_element_ty(tl.int1) if compares else kind
            return tensor(handle(operation(*values), element), kind)

        return call

    for table, compares in ((ARITHMETIC, False), (COMPARISONS, True)):
        for name, operation in table.items():
            setattr(tensor, name, elementwise(getattr(tensor, name), operation, compares))

    general_fma, general_where = tl.fma, tl.where

    def fma(x, y, z):
        given = plain(x, y, z)
        if given is None:
            return general_fma(x, y, z)
        values, element, kind = given
        x, y, z = (handle(np.asarray(value), element) for value in values)
        return tensor(builder.create_fma(x, y, z), kind)

    def where(condition, x, y):
        given = plain(x, y) if type(condition) is tensor else None
        if given is None or condition.dtype.name != "int1":
            return general_where(condition, x, y)
        values, element, kind = given
        mask = condition.type
        if mask is not condition.dtype and mask is not kind.with_element_ty(tl.int1):
            return general_where(condition, x, y)
        return tensor(handle(np.where(condition.handle.data, *values), element), kind)

    tl.fma = tl.math.fma = fma
    tl.where = core.where = where
