"""Describe every kernel launch for compilation without a GPU, for benchmarks.static_costs and the
compile tests.
"""

import inspect
from typing import Any, NamedTuple

import torch

from fastkl.kernels import launch, launch_fused, launch_outside
from fastkl.kernels.layout import layout
from fastkl.kernels.series import KINDS, KL
from fastkl.kernels.variant import FALLBACK_BLOCK, FALLBACK_THREADS

# The plan's vocabulary, as in current models.
VOCABULARY = 128256
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Soft caps, and whether there is a ratio of temperatures. Scalings other than the plain one are
# only for aligned 16-bit logits: their extra cost does not depend on the dtype.
SCALINGS = {"": (0.0, 0.0, False), "_ratio": (0.0, 0.0, True), "_softcap": (30.0, 30.0, False)}
POLICY_ONLY = "token_stats_policy_only"
FIELDS = {
    "kl_divergence": ("kl",),
    "token_stats": launch.FIELDS,
    POLICY_ONLY: ("logprob", "entropy", "lse"),
}
# Gradients to P and to Q; True: also with each scaling, and 16-bit gradients of float32 logits from
# 16-bit GEMMs.
BACKWARDS = {
    "kl_divergence": {"_p": (True, False, True), "_q": (False, True, False), "_both": (True,) * 3},
    "token_stats": {"_p": (True, False, False), "_both": (True,) * 3},
    POLICY_ONLY: {"": (True, False, False)},
}


class Specialization(NamedTuple):
    """One compilation: `kernel` with `signature`, `constexprs` and `attrs`, as for triton.compile's
    ASTSource.

    pairs_per_thread: vocabulary entries of each logits tensor that one thread handles in one
    iteration of the hot loop. segment: entries that one program of forward sums up; 0 for other
    kernels.
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


def _type_of(parameter, dtype, grad_dtype):
    pointers = {
        **dict.fromkeys(("p_ptr", "q_ptr"), dtype),
        **dict.fromkeys(("grad_p_ptr", "grad_q_ptr", "grad_ptr"), grad_dtype),
        **{"tokens_ptr": "i64", "mask_ptr": "i1", "counter_ptr": "i32", "sync_ptr": "i32"},
        **{"ids_ptr": "i64", "totals_ptr": "fp64", "log_sum_ptr": "fp64", "peak_ptr": "fp64"},
        **{"part_ptr": "fp64", "log_sums_ptr": "fp64", "columns_ptr": "i64"},
    }
    if parameter.name.endswith("_ptr"):
        return "*" + pointers.get(parameter.name, "fp32")
    return parameter.annotation.name.replace("int", "i")


def _fused(where, suffix, dtype):
    """Yield (name, Variant, entries per program, dtype of the gradient) of row_fused."""
    chosen = launch_fused.fused_plan(where, TYPES[dtype], ())
    yield f"kl_divergence.fused{suffix}", *chosen.phases, 0, dtype
    if dtype == "fp32":
        (variant,) = launch_fused.fused_plan(where, torch.bfloat16, ()).phases
        yield "kl_divergence.fused_to_16_bit", variant, 0, "bf16"
    elif not suffix:
        yield "kl_divergence.fallback_gradient", chosen.fallback, 0, dtype


def _shards(name, where, asked):
    """Yield (name, Variant) of the additional launches for a vocabulary in four shards."""
    for stage, merges in (("part", False), ("merge", True)):
        split = launch.forward_plan(
            where, *asked, launch.Shard(VOCABULARY, VOCABULARY // 4, 4, merges)
        )
        yield f"{name}.fallback_{stage}", split.fallback
    if name == "skew_kl":
        yield "skew_kl.log_sums", split.log_sums
    yield f"{name}.merge", split.second if name == "skew_kl" else split.forward


def _divergences(where, stride, gradient):
    """Yield (name, Variant, entries per program) of the divergences other than the KL, for two
    rows.

    stride, gradient: rows and (type, address) of gradients to P and Q.
    """
    for kind in [kind for kind in KINDS if kind != "kl"]:
        constants = (("KIND", KINDS[kind]), ("SMALL_REST", False))
        asked = False, False, False, constants, ()
        chosen = launch.forward_plan(where, *asked)
        if kind in ("renyi", "skew_kl"):
            yield f"{kind}.fallback", chosen.fallback
            yield from _shards(kind, where, asked)
        yield (
            f"{kind}.forward",
            chosen.forward if kind == "renyi" else chosen.second,
            chosen.segment,
        )
        for side, wrt in {"p": (1, 0), "q": (0, 1), "both": (1, 1)}.items():
            sides = [gradient if each else None for each in wrt]
            _, backward = launch.backward_plan(where, ("kl",), constants, stride, *sides, ())
            yield f"{kind}.backward_{side}", backward


def _topk(where):
    """Yield (name, Variant) of the launches for lists of 64 tokens, and of row_outside for sorted
    ids.
    """
    types = torch.int64, torch.float32
    if where.case.warp == 32:  # on gfx942 the loop's loads and those of the ids look alike
        yield "topk.outside", launch_outside.outside_plan(where, 64, types, ())[-1]
        yield "topk.outside_sorted", launch_outside.outside_plan(where, 64, (), ())[-1]
    kl, js = (launch_outside.Terms(direction, 0, 0.5, 0.0, 1.0) for direction in (0, 2))
    yield "topk.terms", launch_outside.topk_variant(where.case, 64, types, kl, False)
    yield "topk.js_gradient", launch_outside.topk_variant(where.case, 64, types, js, True)


def plan(dtype, aligned, arch):
    """Return the launches of kl_divergence and token_stats for "bf16", "fp16" or "fp32" logits on
    "sm_90", "gfx942", …

    aligned: every row starts on a 16-byte boundary. Misaligned rows of both tensors start at the
    same distance from one, as in contiguous tensors, except for `forward_q_elsewhere`, where Q is
    read element by element.
    """
    logits = TYPES[dtype]
    start = int(not aligned)
    stride = VOCABULARY + start
    warp = 64 if arch.startswith("gfx") else 32
    specializations = []

    def place(name, scaling=SCALINGS[""], q_start=start):
        """Return the layout of two rows."""
        q_type = None if name == POLICY_ONLY else logits
        types = (logits, q_type, None if name == "kl_divergence" else torch.int64, None)
        addresses = (start * logits.itemsize, q_start * logits.itemsize)
        dims = ((1, 0, 0), (2, stride, stride))
        return layout(
            VOCABULARY, dims, addresses, torch.device("meta"), (arch, warp), types, True, scaling
        )

    def add(name, variant, segment=0, grad_dtype=dtype):
        parameters = inspect.signature(variant.kernel.fn).parameters
        constants, options = variant.constants, dict(variant.options)
        pairs = (
            constants["GROUPS"] * constants["LANES"]
            if "GROUPS" in constants
            else FALLBACK_BLOCK // FALLBACK_THREADS
        )
        signature = {
            each: "constexpr" if each in constants else _type_of(parameter, dtype, grad_dtype)
            for each, parameter in parameters.items()
        }
        # No signature promises alignment: logits may be views, gradients may overwrite them, and a
        # row's saved values are unaligned.
        warps = options.pop("num_warps")
        specializations.append(
            Specialization(
                name, variant.kernel, signature, constants, {}, warps, pairs, options, segment
            )
        )

    def add_backward(name, suffix, asked, scaling, grad_dtype):
        place_of_gradient = TYPES[grad_dtype], start * TYPES[grad_dtype].itemsize
        sides = [place_of_gradient if each else None for each in asked]
        _, variant = launch.backward_plan(
            place(name, scaling), FIELDS[name], KL.constants(), stride, *sides, ()
        )
        add(f"{name}.backward{suffix}", variant, 0, grad_dtype)

    scalings = SCALINGS if aligned and dtype != "fp32" else {"": SCALINGS[""]}
    for name, fields in FIELDS.items():
        asked = "entropy" in fields, "ref_kl" in fields, "lse" in fields, KL.constants(), ()
        for suffix, scaling in scalings.items():
            if suffix and name == POLICY_ONLY:
                continue
            chosen = launch.forward_plan(place(name, scaling), *asked)
            add(f"{name}.forward{suffix}", chosen.forward, chosen.segment)
            # Neither this nor row_fallback with a gradient reads rows in blocks.
            if aligned and not suffix:
                add(f"{name}.fallback", chosen.fallback)
                for each in _shards(name, place(name), asked):
                    add(*each)
            for side, (*wrt, thorough) in BACKWARDS[name].items():
                if thorough or not suffix:
                    add_backward(name, side + suffix, wrt, scaling, dtype)
                if thorough and aligned and dtype == "fp32":
                    add_backward(name, f"{side}_to_16_bit", wrt, scaling, "bf16")
        if not aligned and name != POLICY_ONLY:
            chosen = launch.forward_plan(place(name, q_start=2), *asked)
            add(f"{name}.forward_q_elsewhere", chosen.forward, chosen.segment)
    for suffix, scaling in scalings.items() if aligned else ():
        for each in _fused(place("kl_divergence", scaling), suffix, dtype):
            add(*each)
    gradient = logits, start * logits.itemsize
    for each in _divergences(place("kl_divergence"), stride, gradient):
        add(*each)
    for each in _topk(place(POLICY_ONLY)):
        add(*each)
    return specializations
