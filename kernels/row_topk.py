"""A row's divergence from a teacher known by its top k, and its gradient, from the K listed logits
and the log-sum-exp of the others.

Cells are the listed tokens and, at position K, the rest. With p and q their probabilities and
d = log(q/p), a cell's term and its slope, the derivative with respect to log q, are
    teacher‖student   q - p - p·d    q - p
    student‖teacher   p - q + q·d    q·d
    js                divergence_math.entry_terms: value, to_q
Where only some terms are summed (an ignored tail, a clip), q - p, which sums to 0 over all cells,
is left out of the first two: -p·d with slope -p, q·d with slope q·d + q. The gradient to a cell's
logit, times T, is slope - q·Σ slope.
"""

import triton
import triton.language as tl

from .divergence_math import Formula, double_terms
from .row_finish import store_tuple
from .row_load import row_scale
from .row_math import JS, Kind, soft_cap_slope
from .row_outside import list_entries, wide_scale

# Directions and tails, as numbered by fastkl/ops/topk_rows.py.
TEACHER_STUDENT, STUDENT_TEACHER, JS_DIRECTION = map(tl.constexpr, range(3))
BUCKET, RENORMALIZE, IGNORE = map(tl.constexpr, range(3))


@triton.jit
def add_repeats(ids, log_p, ids_ptr, logprob_ptr, K, V):
    """Return list_entries with the probabilities of equal ids added to the first of them; the
    others are absent.
    """
    offs_k = tl.arange(0, ids.shape[0])
    first = offs_k
    for k in range(K):
        id_k = tl.where(tl.load(logprob_ptr + k) == float("-inf"), V, tl.load(ids_ptr + k))
        first = tl.where((ids == id_k) & (ids < V), tl.minimum(first, k), first)
    repeated = first < offs_k
    # Skip the exponentials of nearly every row: lists rarely repeat an id.
    if tl.max(repeated.to(tl.int32), 0) > 0:
        p = tl.zeros(ids.shape, tl.float64)
        for k in range(K):
            p_k = tl.exp(tl.load(logprob_ptr + k).to(tl.float64))
            p += tl.where((ids == tl.load(ids_ptr + k)) & (ids < V), p_k, 0.0)
        log_p = tl.where(p > tl.exp(log_p), tl.log(p), log_p)
    return tl.where(repeated, V, ids), tl.where(repeated, float("-inf"), log_p)


@triton.jit
def cell_terms(log_p, log_q, share, DIRECTION: tl.constexpr, PLAIN: tl.constexpr):
    """Return the terms and slopes of cells; PLAIN: without q - p."""
    if DIRECTION == JS_DIRECTION:
        # double_terms reads neither curvature nor series.
        terms = double_terms(
            log_p, log_q, Formula(share, 1.0 - share, share, share), Kind(JS, False, False)
        )
        # 0 for a share of 0 or 1; NaN stays NaN.
        inner = tl.where((share > 0.0) & (share < 1.0), 1.0, 0.0)
        return terms.value * inner, terms.to_q * inner
    else:
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        d = log_q - log_p  # NaN where p = q = 0, selected away below
        gap = 0.0 if PLAIN else q - p
        if DIRECTION == TEACHER_STUDENT:
            return gap - tl.where(p == 0.0, 0.0, p * d), -p if PLAIN else gap
        else:
            qd = tl.where(q == 0.0, 0.0, q * d)
            return qd - gap, qd + q if PLAIN else qd


# Row counts, strides, lengths and base addresses vary from step to step and must not cause a
# recompile.
@triton.jit(
    do_not_specialize=[
        "temperature",
        "V",
        "K",
        "share",
        "clip",
        "largest_mass",
    ],
    do_not_specialize_on_alignment=[
        "mask_ptr",
        "temperature_ptr",
        "ids_ptr",
        "logprob_ptr",
        "log_sum_ptr",
        "peak_ptr",
        "entries_ptr",
        "kl_ptr",
        "upstream_ptr",
        "grad_listed_ptr",
        "columns_ptr",
        "g_log_sum_ptr",
    ],
)
def row_topk(  # noqa: PLR0913, PLR0915
    mask_ptr,
    temperature_ptr,
    ids_ptr,
    logprob_ptr,  # as in row_outside
    log_sum_ptr,  # [N] float64, written by row_outside
    peak_ptr,  # [N] float64, likewise
    entries_ptr,  # [N, K + 3] float32: K soft-capped logits, likewise, and three results
    kl_ptr,  # [N] float32; any pointer WITH_GRADIENT
    upstream_ptr,  # [N] float32; any pointer without WITH_GRADIENT
    grad_listed_ptr,  # [N, K] float32; likewise
    columns_ptr,  # [N, K] int64; likewise
    g_log_sum_ptr,  # [N] float32; likewise
    temperature: tl.float64,
    V: tl.int32,
    K: tl.int32,
    share: tl.float64,  # the teacher's, of "js"
    clip: tl.float64,  # any number without CLIPPED
    largest_mass: tl.float64,
    CELLS: tl.constexpr,  # a power of two above K
    DIRECTION: tl.constexpr,
    TAIL: tl.constexpr,
    CLIPPED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Compute a row's divergence, the mass of its list in the student and in the teacher, and 1 if
    the row counts. WITH_GRADIENT, compute instead the gradients to the listed logits and to
    log_sum.

    Math:   this file's docstring, in float64; defined by ops/topk_lists.divergence.
    Grid:   (N,).
    Reads:  N·K of ids, of logprobs and of entries, the first two again from cache, one by one, to
            find repeated ids; two float64 per row. WITH_GRADIENT, one float32 per row.
    Writes: four float32 per row. WITH_GRADIENT, N·K float32 and N·K int64, the gradients and their
            columns, and one float32 per row. An absent entry repeats the gradient of the row's
            largest id; a row that does not count, or whose upstream gradient is 0, gets zeros
            for column 0.
    Saves:  nothing.
    Special values: a row without entries, or masked, does not count and gets zeros. A listed mass
            above largest_mass gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    PLAIN: tl.constexpr = CLIPPED or TAIL == IGNORE
    offs_k = tl.arange(0, CELLS)
    is_rest = offs_k == K
    count = tl.where(tl.load(mask_ptr + row) == 0, 0, K) if HAS_MASK else K
    if WITH_GRADIENT:
        upstream = tl.load(upstream_ptr + row).to(tl.float64)
        count = tl.where(upstream == 0.0, 0, count)
    ids, log_p = list_entries(ids_ptr + row * K, logprob_ptr + row * K, count, V, CELLS)
    ids, log_p = add_repeats(ids, log_p, ids_ptr + row * K, logprob_ptr + row * K, count, V)
    present = ids < V
    entries = tl.sum(present.to(tl.int32), 0)
    counted = entries > 0
    rounded_scale = row_scale(temperature_ptr, temperature, row, row >= 0, TEMPERATURE_PER_ROW)
    scale = wide_scale(rounded_scale, temperature_ptr, temperature, row, TEMPERATURE_PER_ROW)
    entries_ptr += row * (K + 3)
    capped = tl.load(entries_ptr + offs_k, mask=present, other=0.0).to(tl.float64)
    x = tl.where(present, capped, float("-inf"))
    # The student's cells relative to the largest logit, or to the largest listed one: below a rest
    # 745 nats higher a renormalised list would be 0.
    rest_peak = tl.load(peak_ptr + row)
    peak = tl.max(x, 0) if TAIL == RENORMALIZE else tl.maximum(tl.max(x, 0), rest_peak)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    log_q = tl.where(
        is_rest, (rest_peak - peak) * scale + tl.load(log_sum_ptr + row), (x - peak) * scale
    )
    total = tl.sum(tl.exp(log_q), 0)
    listed = tl.sum(tl.where(is_rest, 0.0, tl.exp(log_q)), 0)
    mass = tl.sum(tl.exp(log_p), 0)
    if TAIL == RENORMALIZE:
        log_q = tl.where(is_rest, float("-inf"), log_q) - tl.log(listed)
        log_p -= tl.log(mass)
    else:
        log_q -= tl.log(total)
    q = tl.exp(log_q)
    if TAIL == BUCKET:
        # With all V tokens listed no token remains for the mass lost to rounding.
        log_p = tl.where(
            is_rest,
            tl.where((mass < 1.0) & (entries < V), tl.log(1.0 - mass), float("-inf")),
            log_p,
        )
        if DIRECTION == STUDENT_TEACHER:
            # The student's rest adds 0 if the teacher has none.
            log_q = tl.where(log_p == float("-inf"), float("-inf"), log_q)
    elif TAIL == IGNORE:
        log_q = tl.where(is_rest, float("-inf"), log_q)
    value, slope = cell_terms(log_p, log_q, share, DIRECTION, PLAIN)
    if CLIPPED:
        slope = tl.where(value > clip, 0.0, slope)
        value = tl.where(value > clip, clip, value)
    if not WITH_GRADIENT:
        kl = tl.sum(value, 0)
        if not PLAIN:
            kl = tl.where(kl < 0.0, 0.0, kl)
        kl = tl.where(mass > largest_mass, float("nan"), kl)
        student_mass = tl.where(mass > largest_mass, float("nan"), listed / total)
        tl.store(kl_ptr + row, tl.where(counted, kl, 0.0))
        summary = (
            tl.where(counted, student_mass, 0.0),
            tl.where(counted, mass, 0.0),
            tl.where(counted, 1.0, 0.0),
        )
        store_tuple(entries_ptr + K, summary)
    else:
        upstream = tl.where(mass > largest_mass, float("nan"), upstream)
        # The rest's `capped` is 0, where the slope of a soft cap is 1.
        grad = (slope - q * tl.sum(slope, 0)) * upstream * soft_cap_slope(capped, SOFTCAP)
        grad_rest = tl.sum(tl.where(is_rest, grad, 0.0), 0)
        tl.store(g_log_sum_ptr + row, tl.where(counted, grad_rest, 0.0))
        # Equal values in one column: a scatter of them is deterministic.
        last = tl.max(tl.where(present, ids, 0), 0)
        grad_last = tl.sum(tl.where(present & (ids == last), grad, 0.0), 0)
        grad = tl.where(present, grad * scale, grad_last * tl.where(counted, scale, 0.0))
        places = row * K + offs_k
        tl.store(grad_listed_ptr + places, grad, mask=offs_k < K)
        tl.store(columns_ptr + places, tl.where(present, ids, last), mask=offs_k < K)
