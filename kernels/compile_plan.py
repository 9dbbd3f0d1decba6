"""Every kernel as it is launched, described for a compiler without a GPU; used by
benchmarks.static_costs and the compile tests.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import triton

from . import config
from .launch import FALLBACK_BLOCK, FALLBACK_ROWS, FALLBACK_THREADS, OPTIONS, fallback_options
from .row_backward import row_backward
from .row_fallback import row_fallback
from .row_forward import row_forward
from .row_fused import row_fused

# A vocabulary of today's models: the plan describes the launches for it.
VOCABULARY = 128256
_FIELDS = ("LOGPROB", "ENTROPY", "REF_LOGPROB", "KL", "REF_KL")
_INTEGERS = (
    "n_inner",
    "n_rows",
    "V",
    "segment",
    "piece",
    "pieces",
    "splits",
    "prefetching",
    "chunks",
)


@dataclasses.dataclass(frozen=True)
class Specialization:
    """One compilation: `kernel` with `signature` and `constexprs`, as triton.compile's ASTSource
    takes them.

    pairs_per_thread: vocabulary entries of each logits tensor that one thread handles in one
    iteration of the hot loop.
    segment: entries that one program of forward sums up; 0 for other kernels.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[Any]]
    num_warps: int
    pairs_per_thread: int
    options: dict[str, Any]
    segment: int = 0


_Values = list[tuple[str, dict[str, Any]]]  # suffixes of names, and compile-time values


def _type_of(name: str, dtype: str, grad_dtype: str) -> str:
    if name in ("p_ptr", "q_ptr"):
        return f"*{dtype}"
    if name in ("grad_p_ptr", "grad_q_ptr", "grad_ptr"):
        return f"*{grad_dtype}"
    if name.endswith("_ptr"):
        return {
            "tokens_ptr": "*i64",
            "mask_ptr": "*i1",
            "counter_ptr": "*i32",
            "sync_ptr": "*i32",
        }.get(name, "*fp32")
    if name.startswith("stride_"):
        return "i64"
    return "i32" if name in _INTEGERS else "fp32"


def _specialization(
    name: str,
    kernel: Any,
    constexprs: dict[str, Any],
    types: tuple[str, str],
    pairs: int,
    options: dict[str, Any],
    segment: int = 0,
) -> Specialization:
    """Describe a launch; types: of logits and of gradients."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {
        argument: "constexpr" if argument in constexprs else _type_of(argument, *types)
        for argument in names
    }
    # No signature promises alignment: logits may be views, gradients may overwrite them, and a
    # row's saved values begin anywhere.
    return Specialization(
        name,
        kernel,
        signature,
        constexprs,
        {},
        options["num_warps"],
        pairs,
        {key: value for key, value in {**OPTIONS, **options}.items() if key != "num_warps"},
        segment,
    )


def plan(dtype: str, aligned: bool, arch: str) -> list[Specialization]:
    """The launches of kl_divergence and token_stats for "bf16", "fp16" or "fp32" logits on "sm_90",
    "gfx942", …

    aligned: every row starts on a 16-byte boundary. Misaligned rows of both tensors start equally
    far from one, as in contiguous tensors, but for `forward_q_elsewhere`, where they do not and Q
    is read element by element.
    """
    itemsize = 4 if dtype == "fp32" else 2
    lanes = 16 // itemsize
    warp = 64 if arch.startswith("gfx") else 32
    forward, backward, fused = (
        config.select(direction, arch, itemsize, VOCABULARY)
        for direction in ("forward", "backward", "fused")
    )
    plain: dict[str, Any] = dict(
        HAS_MASK=True, TEMPERATURE_PER_ROW=False, SOFTCAP=0.0, REF_SOFTCAP=0.0, HAS_RATIO=False
    )
    segment = config.segment_length(VOCABULARY, forward.segment)
    shape = dict(
        SPLITS=triton.next_power_of_2(-(-VOCABULARY // segment)),
        THREADS=forward.threads,
        GROUPS=forward.groups,
        LANES=lanes,
        PREFETCH=config.prefetches(arch),
        REALIGN=not aligned,
        Q_IN_BLOCKS=True,
    )
    specializations: list[Specialization] = []

    def add(
        name: str,
        kernel: Any,
        chosen: config.RowConfig,
        constexprs: dict[str, Any],
        grad_dtype: str | None = None,
    ) -> None:
        needs_registers = not aligned or constexprs["SOFTCAP"] > 0.0 or constexprs["HAS_RATIO"]
        options = chosen.options(arch, needs_registers, constexprs.get("Q_IN_BLOCKS", True))
        specializations.append(
            _specialization(
                name,
                kernel,
                constexprs,
                (dtype, grad_dtype or dtype),
                chosen.groups * lanes,
                {**options, "num_warps": chosen.threads // warp},
                segment if kernel is row_forward else 0,
            )
        )

    # Ratios and soft caps are described for 16-bit logits alone: what they add does not depend on
    # the type.
    sixteen_bit = aligned and itemsize == 2
    scaled: _Values = [
        ("_ratio", dict(HAS_RATIO=True)),
        ("_softcap", dict(SOFTCAP=30.0, REF_SOFTCAP=30.0)),
    ]
    scalings: _Values = [("", {}), *(scaled if sixteen_bit else ())]
    for name, entropy, kl, reverse in (
        ("kl_divergence", False, True, False),
        ("token_stats", True, True, True),
        ("token_stats_policy_only", True, False, False),
    ):
        asked = dict(
            HAS_TOKENS=name != "kl_divergence",
            WITH_ENTROPY=entropy,
            WITH_KL=kl,
            WITH_REF_KL=reverse,
        )
        constexprs = {**shape, **plain, **asked}
        for suffix, values in scalings if kl else scalings[:1]:
            add(f"{name}.forward{suffix}", row_forward, forward, {**constexprs, **values})
        if not aligned and kl:
            add(
                f"{name}.forward_q_elsewhere",
                row_forward,
                forward,
                {**constexprs, "Q_IN_BLOCKS": False},
            )
        for suffix, gradient in (("fallback", False), ("fallback_gradient", True)):
            # Neither reads rows in blocks; row_fused asks for the gradient of a KL.
            if not aligned or (gradient and not (sixteen_bit and name == "kl_divergence")):
                continue
            constants = {
                key: value
                for key, value in {**plain, **asked}.items()
                if key in row_fallback.arg_names
            }
            constants.update(ROWS=FALLBACK_ROWS, BLOCK=FALLBACK_BLOCK, WITH_GRADIENT=gradient)
            specializations.append(
                _specialization(
                    f"{name}.{suffix}",
                    row_fallback,
                    constants,
                    (dtype, dtype),
                    FALLBACK_BLOCK // FALLBACK_THREADS,
                    fallback_options(arch, warp),
                )
            )
    for name, fields, wrt_p, wrt_q in (
        ("kl_divergence.backward_p", ("KL",), True, False),
        ("kl_divergence.backward_q", ("KL",), False, True),
        ("kl_divergence.backward_both", ("KL",), True, True),
        ("token_stats.backward_p", _FIELDS, True, False),
        ("token_stats.backward_both", _FIELDS, True, True),
        ("token_stats_policy_only.backward", ("LOGPROB", "ENTROPY"), True, False),
    ):
        constexprs = dict(
            CHUNK=backward.segment,
            THREADS=backward.threads,
            LANES=lanes,
            GROUPS=backward.groups,
            WRT_P=wrt_p,
            WRT_Q=wrt_q,
            Q_IN_BLOCKS=True,
            GRAD_IN_BLOCKS=True,
            **{field: fields.index(field) if field in fields else -1 for field in _FIELDS},
            **plain,
        )
        thorough = name in (
            "kl_divergence.backward_p",
            "kl_divergence.backward_both",
            "token_stats.backward_both",
        )
        for suffix, values in scalings if thorough else scalings[:1]:
            add(f"{name}{suffix}", row_backward, backward, {**constexprs, **values})
        if (
            thorough and aligned and not sixteen_bit
        ):  # of logits that are float32 sums of 16-bit products
            add(f"{name}_to_16_bit", row_backward, backward, constexprs, "bf16")
    if aligned:
        segment = config.segment_length(VOCABULARY, fused.segment)
        splits = -(-VOCABULARY // segment) * -(-segment // fused.segment)
        constexprs = dict(
            SPLITS=triton.next_power_of_2(splits),
            THREADS=fused.threads,
            LANES=lanes,
            GROUPS=fused.groups,
            PREFETCH=config.prefetches(arch),
            PHASE=0,
            **plain,
        )
        for suffix, values in scalings:
            add(f"kl_divergence.fused{suffix}", row_fused, fused, {**constexprs, **values})
        if not sixteen_bit:
            add("kl_divergence.fused_to_16_bit", row_fused, fused, constexprs, "bf16")
    return specializations
