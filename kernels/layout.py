"""Describe the memory layout of rows, and the properties that select a compilation."""

import dataclasses
import functools
from typing import NamedTuple

import torch

# Addresses matter modulo 32 bytes: a block has up to eight elements of up to four bytes, as with
# float32 gradients of 16-bit logits.
ADDRESSES = 32
# Size of the caches of layouts and launch plans: runs that pad to the longest sequence have many
# shapes.
CACHE_SIZE = 1024


class Rows(NamedTuple):
    """The address and strides of a tensor's rows: [outer, inner, V] with two strides (in elements),
    for any leading shape.

    address: of the first element, in bytes, modulo ADDRESSES.
    """

    itemsize: int
    address: int
    stride_outer: int
    stride_inner: int

    @property
    def lanes(self) -> int:
        """Elements per 16-byte block."""
        return 16 // self.itemsize

    def same_blocks(self, other: "Rows", inner: int, outer: int) -> bool:
        """Return whether each row of both tensors starts at the same distance, in elements, from a
        boundary of this tensor's 16-byte blocks.

        The other tensor's blocks have as many elements: 8 bytes if it is 16-bit and this one
        32-bit.
        """
        lanes = self.lanes
        return (
            (self.address // self.itemsize - other.address // other.itemsize) % lanes == 0
            and (inner == 1 or (self.stride_inner - other.stride_inner) % lanes == 0)
            and (outer == 1 or (self.stride_outer - other.stride_outer) % lanes == 0)
        )


class Problem(NamedTuple):
    """N rows of length V; unused fields are None. Vectors are [N] and contiguous.

    ratios: inverse temperatures of Q over those of P, None for 1.
    """

    p: torch.Tensor
    q: torch.Tensor | None
    layout: "Layout"
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    temperature: float
    temperatures: torch.Tensor | None
    ratios: torch.Tensor | None


@functools.cache
def architecture(device: torch.device) -> tuple[str, int]:
    """Return a device's name in the configuration table and its threads per warp."""
    if device.type != "cuda":
        return "interpreter", 32
    if torch.version.hip:
        properties = torch.cuda.get_device_properties(device)
        return properties.gcnArchName.split(":")[0], properties.warp_size
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}", 32


# The dtypes of p, q, tokens and temperatures; None if absent.
Types = tuple[torch.dtype, torch.dtype | None, torch.dtype | None, torch.dtype | None]


class Case(NamedTuple):
    """Properties of a problem that select a compilation, in addition to configuration and fields.

    arch, warp: see architecture.
    """

    device: torch.device
    arch: str
    warp: int
    types: Types
    has_mask: bool
    realign: bool
    q_in_blocks: bool
    softcap: float
    ref_softcap: float
    has_ratio: bool

    @property
    def constants(self) -> dict[str, object]:
        """The compile-time values that every kernel takes."""
        return dict(
            LANES=16 // self.types[0].itemsize,
            HAS_MASK=self.has_mask,
            TEMPERATURE_PER_ROW=self.types[3] is not None,
            Q_IN_BLOCKS=self.q_in_blocks,
            SOFTCAP=self.softcap,
            REF_SOFTCAP=self.ref_softcap,
            HAS_RATIO=self.has_ratio,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """N = outer · inner rows of length V in memory, of the policy or of both models; cached, so
    that equal layouts are one object, hashed by identity.

    places: the kernels' arguments for the layout, in signature order.
    """

    p: Rows
    outer: int
    inner: int
    vocabulary: int
    places: dict[str, int]
    case: Case
    rows: int


@functools.lru_cache(CACHE_SIZE)
def layout(
    vocabulary: int,
    dims: tuple[tuple[int, int, int], tuple[int, int, int]],
    addresses: tuple[int, int],
    device: torch.device,
    arch_and_warp: tuple[str, int],
    types: Types,
    has_mask: bool,
    scaling: tuple[float, float, bool],
) -> Layout:
    """Return the Layout for (size, stride of P, stride of Q) of the outer and the inner dimension.

    arch_and_warp: architecture(device). scaling: softcap, ref_softcap, has_ratio.
    """
    (outer, *outer_strides), (inner, *inner_strides) = dims
    p, q = (
        Rows((dtype or types[0]).itemsize, address, *strides)
        for dtype, address, *strides in zip(
            types, addresses, outer_strides, inner_strides, strict=False
        )
    )
    in_blocks = types[1] is None or (p.lanes == q.lanes and p.same_blocks(q, inner, outer))
    realign = not p.same_blocks(Rows(p.itemsize, 0, 0, 0), inner, outer)
    arch, warp = arch_and_warp
    case = Case(device, arch, warp, types, has_mask, realign, in_blocks, *scaling)
    return Layout(
        p,
        outer,
        inner,
        vocabulary,
        dict(
            n_inner=inner,
            stride_p_outer=p.stride_outer,
            stride_p_inner=p.stride_inner,
            stride_q_outer=q.stride_outer,
            stride_q_inner=q.stride_inner,
        ),
        case,
        outer * inner,
    )


def grads_in_blocks(layout: Layout, stride: int, *grads: tuple[torch.dtype, int] | None) -> bool:
    """Return whether gradient rows, `stride` apart, start at the same place in a block as logits
    rows.
    """
    return all(
        [
            grad is None
            or layout.p.same_blocks(
                Rows(grad[0].itemsize, grad[1], layout.inner * stride, stride),
                layout.inner,
                layout.outer,
            )
            for grad in grads
        ]
    )
