"""Choose how an op runs: a plain autograd.Function in eager mode, which is fast; a registered
custom op when a compiler, tracer, dispatch mode or subclass must see it.

The path through torch.library is always correct, but with few rows it costs more than the rest of
the call. Eager mode with plain tensors, nearly every call, uses a Function over the same code; so
do torch.func's transforms, because torch.func.grad does not accept such an op. torch.compile,
torch.export, tracers, dispatch modes (selective checkpointing, fake tensors), functionalize, tensor
subclasses and meta tensors get the op. A TorchFunctionMode (as set by torch.set_default_device)
sees neither.
"""

import functools
import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch

from .. import _checks, _modes

# A copy of the package under another name, such as a kernel from the Hub, registers its own ops.
NAMESPACE = __name__.removesuffix(".ops.dual_op").replace(".", "_")
Outputs = TypeVar("Outputs")
# The type of a NamedTuple's field in an op's schema.
_SCHEMA = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    str: "str",
    bool: "bool",
    torch.dtype: "ScalarType",
    int | None: "SymInt?",
}


class Rules(NamedTuple):
    """An op's rules for autograd, vmap and FLOP counting.

    backward: as in torch.autograd.Function.
    setup_context(ctx, groups, outputs): likewise. `ctx.eager` exists in eager mode, where only the
    caller and autograd hold the outputs.
    rowwise: whether all tensors share their leading dimensions, so that a vmap is one call with an
    extra dimension; otherwise one call per sample.
    flops(*groups with shapes in place of tensors): floating-point operations of the GEMMs, for
    torch.utils.flop_counter; None for none.
    """

    backward: Callable[..., Any]
    setup_context: Callable[..., None] = lambda *_: None
    rowwise: bool = False
    flops: Callable[..., int] | None = None


class DualOp(Generic[Outputs]):
    """A computation with a gradient rule, called by the fastest path that is correct.

    `.op` is the custom op NAMESPACE::name; its arguments are the fields of all groups, in order.

    groups: NamedTuples of the arguments; the first field of the first is a tensor.
    compute(*groups), fake(*groups): the outputs, with and without values: a tensor, or a tuple with
    None for an output that was not requested, which the op returns as an empty tensor.
    outputs: the number of tensors that the op returns.
    returned: outputs returned in eager mode (None: all); the others serve backward only and would
    cost autograd time.
    """

    def __init__(
        self,
        name: str,
        groups: Sequence[type[tuple[Any, ...]]],
        compute: Callable[..., Outputs],
        fake: Callable[..., Any],
        *,
        outputs: int,
        rules: Rules,
        returned: int | None = None,
    ) -> None:
        name = f"{NAMESPACE}::{name}"
        self._name, self._groups, self._compute = name, groups, compute
        kinds = [kind for each in groups for kind in get_type_hints(each).values()]
        tensors = torch.Tensor, torch.Tensor | None
        # The arguments that may be tensors; every op has several.
        self._tensors = operator.itemgetter(*[i for i, k in enumerate(kinds) if k in tensors])
        backward, setup_context, rowwise, self._flops = rules
        group = self._group
        self.op = torch.library.custom_op(
            name,
            _with_tensors(lambda *inputs: compute(*group(inputs))),
            mutates_args=(),
            schema=_schema(groups, outputs),
        )
        self.op.register_fake(_with_tensors(lambda *inputs: fake(*group(inputs))))

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, group(inputs), output)

        self.op.register_autograd(backward, setup_context=setup)

        def forward(ctx: Any, *inputs: Any) -> Any:
            packed = group(inputs)
            results: Any = compute(*packed)
            ctx.eager = True
            setup_context(ctx, packed, results)
            return results if returned is None else results[:returned]

        self.op.register_vmap(functools.partial(_vmap, self.op, rowwise))
        # Call the C++ apply of Function's base class. Function.apply would look for transforms and
        # their wrappers at each call, which __call__ has ruled out, and inspect the signature of
        # setup_context.
        eager: Any = super(
            torch.autograd.Function, _function(name, forward=forward, backward=backward)
        )
        self._eager: Callable[..., Outputs] = eager.apply
        # Inside a transform's rule the call may meet another transform or a tracer: dispatch again.
        # The rule needs every output: if eager mode returns fewer, take the op.
        dispatch = _with_tensors(
            lambda *inputs: (
                self(*group(inputs))
                if returned is None or _modes.transforming()
                else self.op(*inputs)
            )
        )
        self._transformed = _function(
            name,
            forward=dispatch,
            backward=backward,
            setup_context=setup,
            vmap=functools.partial(_vmap, dispatch, rowwise),
            jvp=lambda ctx, *tangents: _checks.refuse_forward_mode("inputs"),
        )

    def __call__(
        self, *groups: tuple[Any, ...], unobserved: Callable[..., Outputs] | None = None
    ) -> Outputs:
        """Compute. `unobserved` replaces `compute` if no compiler, mode, transform or double
        backward sees the call; it may overwrite its inputs.
        """
        inputs = groups[0] if len(groups) == 1 else tuple(itertools.chain(*groups))
        # Dynamo first: the checks below cannot be traced. Then transforms, inside which tensors are
        # wrappers.
        op: Callable[..., Outputs] = self.op
        if torch.compiler.is_compiling() or not _modes.SHORT_WAYS:
            return op(*inputs)
        if _modes._are_functorch_transforms_active():
            functionalizing = (
                _modes.peek_interpreter_stack().key() == _modes.TransformType.Functionalize
            )
            transformed: Callable[..., Outputs] = self._transformed.apply
            return (op if functionalizing else transformed)(*inputs)
        if not _modes.plain(self._tensors(inputs)):
            self._tell_flop_counter()
            return op(*inputs)
        if torch.is_grad_enabled():
            return self._eager(*inputs)
        compute = unobserved or self._compute
        if not _modes._profiler_enabled():
            return compute(*groups)
        with torch.autograd.profiler.record_function(self._name):
            return compute(*groups)

    def _group(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return the arguments repacked as NamedTuples."""
        if len(self._groups) == 1:
            return (self._groups[0](*inputs),)
        rest = iter(inputs)
        return tuple(
            [kind(*itertools.islice(rest, len(kind._fields))) for kind in self._groups]  # type: ignore[attr-defined]
        )

    def _tell_flop_counter(self) -> None:
        """Register the FLOP formula with torch and with active counters, which have copied torch's
        registry.

        Deferred to a call under a mode: importing torch.utils.flop_counter imports Triton.
        """
        counting = sys.modules.get("torch.utils.flop_counter")
        flops = self._flops
        if flops is None or counting is None:
            return
        packet = getattr(getattr(torch.ops, NAMESPACE), self._name.partition("::")[2])
        if packet not in counting.flop_registry:
            counting.register_flop_formula(packet)(
                lambda *inputs, out_shape=None, **_: flops(*self._group(inputs))
            )
        for mode in _modes._get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", mode)
            if isinstance(counter, counting.FlopCounterMode):
                counter.flop_registry.setdefault(packet, counting.flop_registry[packet])


def save_tensors(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Call ctx.save_for_backward, for inference tensors too (reference logits often are): with an
    alias, because they have no version counter.

    In-place changes to them before backward go undetected.
    """
    ctx.save_for_backward(
        *[
            value.new_empty(0).set_(value)  # type: ignore[call-overload]  # torch's stubs know storages alone
            if value is not None and value.is_inference()
            else value
            for value in tensors
        ]
    )


def _schema(groups: Sequence[type[tuple[Any, ...]]], outputs: int) -> str:
    """Return the schema of an op with the groups' fields as arguments."""
    arguments = [
        f"{_SCHEMA[kind]} {field}"
        for group in groups
        for field, kind in get_type_hints(group).items()
    ]
    returns = ", ".join(["Tensor"] * outputs)
    return f"({', '.join(arguments)}) -> {returns if outputs == 1 else f'({returns})'}"


def _with_tensors(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return the computation with an empty tensor in place of None."""

    def filled(*inputs: Any) -> Any:
        outputs = compute(*inputs)
        return (
            outputs
            if isinstance(outputs, torch.Tensor)
            else tuple(inputs[0].new_empty(0) if value is None else value for value in outputs)
        )

    return filled


def _vmap(
    call: Callable[..., Any],
    rowwise: bool,
    info: Any,
    in_dims: tuple[int | None, ...],
    *inputs: Any,
) -> tuple[Any, Any]:
    """Compute (outputs, out_dims) of a vmap; an output that was not requested is not mapped."""
    size, pairs = info.batch_size, list(zip(inputs, in_dims, strict=True))
    if rowwise:
        outputs = call(
            *(
                value.expand(size, *value.shape)
                if dim is None and isinstance(value, torch.Tensor)
                else value
                if dim is None
                else value.movedim(dim, 0)
                for value, dim in pairs
            )
        )
    elif size == 0:
        raise RuntimeError(
            "fastkl: vmap over no samples: expected at least one, since each is a call of its own; "
            "leave the call out"
        )
    else:
        samples = [
            call(*(value if dim is None else value.select(dim, i) for value, dim in pairs))
            for i in range(size)
        ]
        single = isinstance(samples[0], torch.Tensor)
        outputs = (
            torch.stack(samples) if single else [*map(torch.stack, zip(*samples, strict=True))]
        )
    if isinstance(outputs, torch.Tensor):
        return outputs, 0
    return tuple(outputs), tuple(0 if x.shape[:1] == (size,) else None for x in outputs)


def _function(name: str, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
    """Return a torch.autograd.Function that profilers and grad_fn show under the op's name."""
    return type(
        name,
        (torch.autograd.Function,),
        {method: staticmethod(function) for method, function in methods.items()},
    )
