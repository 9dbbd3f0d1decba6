"""What a candidate of benchmarks.tune goes through: checks, side by side in worker processes, and times, in one process that has the GPU to itself.

A check compiles the kernels of one variant (operation, element type, where rows start, soft cap, gradients) with the candidate, runs them on a few
rows of the real length and answers with a Verdict: values and gradients against float64, the same bits for a row alone, in a batch and at other
positions, and the registers and spilled bytes of what was compiled. What a worker compiled comes from Triton's cache on disk when it is timed.
"""
import functools
import itertools
import math
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.cases import DIFFERENTIATED, DTYPES, LIMITS, Workload, make_inputs
from benchmarks.plain import plain_token_stats
from fastkl import _rows

KL, ALL = ("kl",), _rows.FIELDS
# Of token_stats, the fields that a policy-gradient step differentiates.
STEP = tuple(ALL[i] for i in DIFFERENTIATED["token_stats"])
# What is timed, and what a candidate is screened by: {direction: {operation: (fields, fields with an upstream gradient, gradient to)}}.
TIMED = {
    "forward": {"kl_divergence": (KL, (), ""), "token_stats": (ALL, (), "")},
    "backward": {"kl_divergence dp": (KL, KL, "p"), "kl_divergence dq": (KL, KL, "q"), "token_stats dp": (ALL, STEP, "p")},
}
SOFTCAP = 30.0  # Gemma's
CHECKED_ROWS = 12
# One row alone, the last one alone, some in the middle: at another place of the grid than in the whole batch.
PARTS = (slice(3, 4), slice(CHECKED_ROWS - 1, None), slice(2, 9))
WORKER_BYTES = 2**31  # of the GPU's memory, context included: twice what one takes at a vocabulary of 128256


@dataclass(frozen=True)
class Variant:
    """One way to compile and call the kernels.

    fields: what forward computes; upstream: the fields with an upstream gradient; wrt: the gradients, "p", "q", "pq" or "" for none; placements:
    where the rows start, one after the other: "aligned" (all on a 16-byte boundary), "misaligned" (P's and Q's at the same distances from one),
    "apart" (Q's elsewhere than P's).
    """

    fields: tuple[str, ...]
    upstream: tuple[str, ...]
    wrt: str
    dtype: str
    placements: tuple[str, ...]
    softcap: float = 0.0

    @property
    def name(self):
        """The variant in a few words, for reports."""
        operation = "kl_divergence" if self.fields == KL else "token_stats"
        words = [operation, *(f"d{side}" for side in self.wrt), self.dtype, "+".join(self.placements), "softcap" if self.softcap else ""]
        return " ".join(words).rstrip()


def timed_variants(direction, dtype, vocabulary):
    """The variants that are timed: contiguous rows."""
    placement = "misaligned" if vocabulary % (16 // DTYPES[dtype].itemsize) else "aligned"
    return [Variant(*how, dtype, (placement,)) for how in TIMED[direction].values()]


def all_variants(direction, dtype):
    """The variants that an entry of the table is for: all types of its size, placements, soft cap or none, all gradients.

    Those that take the most registers come first: what is refused is refused soon. Of the second type there is the kernel that gives both gradients.
    """
    others = ("fp16" if dtype == "bf16" else "bf16",) if DTYPES[dtype].itemsize == 2 else ()
    found = []
    for softcap, fields in itertools.product((SOFTCAP, 0.0), (ALL, KL)):
        found += [Variant(fields, fields, "pq", kind, ("aligned", "misaligned"), softcap) for kind in (dtype, *others)]
        if direction == "backward":
            found += [Variant(fields, fields, wrt, dtype, ("aligned", "misaligned"), softcap) for wrt in "pq"]
    return found + [Variant(fields, fields, "pq", dtype, ("aligned", "apart")) for fields in (ALL, KL)]


# The check, in a worker -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A candidate for "forward" or "backward" and the variant to check it by, on rows of `vocabulary` entries."""

    direction: str
    config: object
    variant: Variant
    vocabulary: int
    device: str


@dataclass(frozen=True)
class Verdict:
    """A check's answer: why the candidate is refused, if it is; bytes that a thread spills and registers that it takes, at most, where known.

    fatal: the process that answered is of no more use.
    """

    refused: str | None = None
    spilled: int = 0
    registers: int | None = None
    fatal: bool = False


def check(job):
    """The Verdict on one variant of a candidate; nothing that goes wrong is raised."""
    from fastkl.kernels.config import override

    try:
        with override(**{job.direction: job.config}):
            before = _compiled(job.direction)
            refused = _fault(job)
            # What was compiled in an earlier job was looked at then.
            new = [kernel for key, kernel in _compiled(job.direction).items() if key not in before]
    except Exception as error:  # a candidate may not compile, or ask for more than the GPU has: that is its result
        return Verdict(f"{job.variant.name}: {type(error).__name__}: {' '.join(str(error).split())}"[:300], fatal=not _usable(job.device))
    spilled = max((4 * kernel.n_spills for kernel in new), default=0)  # Triton counts words
    return Verdict(refused and f"{job.variant.name}: {refused}", spilled, max((kernel.n_regs for kernel in new), default=None))


def failed(job, reason):
    """The Verdict of a job that got no answer."""
    return Verdict(f"{job.variant.name}: {reason}")


def begin(device):
    """What a worker does before its first job: the GPU's context takes seconds."""
    torch.set_num_threads(1)
    torch.zeros(1, device=device).item()
    import fastkl.kernels.launch  # noqa: F401  (with Triton)


def _usable(device):
    """Whether the device still computes: after some errors none of a process's calls does."""
    try:
        return torch.ones(2, device=device).sum().item() == 2.0
    except Exception:
        return False


def _compiled(direction):
    """{id: compiled kernel} of the kernel that a direction's configuration is for; none in the interpreter."""
    from fastkl.kernels import launch

    caches = list(getattr(getattr(launch, f"row_{direction}"), "device_caches", {}).values())
    return {id(compiled): compiled for cache, *_ in caches for compiled in cache.values()}


@functools.lru_cache(maxsize=2)
def _sample(vocabulary, dtype, device):
    """(P, Q, tokens, upstream gradients by field) of CHECKED_ROWS rows, contiguous."""
    device = torch.device(device)
    inputs = make_inputs(Workload(rows=CHECKED_ROWS, vocabulary=vocabulary, dtype=dtype), device)
    generator = torch.Generator(device).manual_seed(1)
    noise = {name: torch.randn(CHECKED_ROWS, generator=generator, device=device) for name in ALL}
    # Away from 0, or the gradients of a long row would drown in float16's smallest step.
    upstream = {name: value + value.sign() for name, value in noise.items()}
    return inputs.p.detach(), inputs.q.detach(), inputs.tokens, upstream


@functools.lru_cache(maxsize=4)
def _truth(vocabulary, dtype, softcap, upstream, device):
    """(outputs by field, gradients by side) in float64, by autograd through plain torch."""
    p, q, tokens, gradients = _sample(vocabulary, dtype, device)
    sides = [side.double().requires_grad_() for side in (p, q)]
    x, y = (softcap * torch.tanh(side / softcap) if softcap else side for side in sides)
    outputs = dict(zip(ALL, plain_token_stats(x, tokens, y), strict=True))
    found = torch.autograd.grad([outputs[name] for name in upstream], sides, [gradients[name].double() for name in upstream]) if upstream else ()
    return {name: value.detach() for name, value in outputs.items()}, dict(zip("pq", found, strict=bool(found)))


def _placed(rows, placement, side):
    """The same rows between NaN, as far apart as `placement` of a Variant says."""
    count, vocabulary = rows.shape
    lanes = 16 // rows.element_size()
    stride = -(-vocabulary // lanes) * lanes if placement == "aligned" else vocabulary | 1
    offset = int(placement == "apart" and side == "q")
    storage = torch.full((offset + count * stride + lanes,), math.nan, dtype=rows.dtype, device=rows.device)
    return storage.as_strided((count, vocabulary), (stride, 1), offset).copy_(rows)


def _forward(variant, p, q, tokens):
    """(outputs by field, what is saved for backward), from the kernels."""
    outputs = {name: torch.full_like(tokens, math.nan, dtype=torch.float32) for name in variant.fields}
    saved = torch.full((p.shape[0], _rows.SAVED), math.nan, device=p.device)
    _rows.forward("triton", p, q, tokens if "logprob" in variant.fields else None, None, 1.0, outputs, saved,
                  _rows.Scaling(variant.softcap, variant.softcap))
    return outputs, saved


def _backward(variant, p, q, tokens, saved, upstream, grads):
    """Fill the gradients by side, of which those in variant.wrt are there, from the kernels."""
    named = {name: upstream[name].contiguous() for name in variant.upstream}
    _rows.backward("triton", p, q, tokens if "logprob" in variant.fields else None, None, 1.0, saved, named, grads.get("p"), grads.get("q"),
                   _rows.Scaling(variant.softcap, variant.softcap))


def _off(outputs, gradients, truth, dtype):
    """What is off by more than the limits of benchmarks.cases; None where nothing is."""
    for name, value in outputs.items():
        error = ((value.double() - truth[0][name]).abs() / truth[0][name].abs().clamp_min(1e-3)).max().item()
        if not error <= LIMITS[dtype]["values"]:  # a NaN has to fail
            return f"{name} off by {error:.1e}, limit {LIMITS[dtype]['values']:.0e}"
    for side, value in gradients.items():
        error = ((value.double() - truth[1][side]).norm(dim=-1) / truth[1][side].norm(dim=-1)).max().item()
        if not error <= LIMITS[dtype]["gradient"]:
            return f"gradient to {side} off by {error:.1e}, limit {LIMITS[dtype]['gradient']:.0e}"
    return None


@functools.lru_cache(maxsize=4)
def _saved(vocabulary, dtype, softcap, device):
    """What the present forward saves for the backward of any fields."""
    p, q, tokens, _ = _sample(vocabulary, dtype, device)
    return _forward(Variant(ALL, (), "", dtype, (), softcap), _placed(p, "aligned", "p"), _placed(q, "aligned", "q"), tokens)[1]


def _fault(job):
    """What is wrong with the kernels of a variant, values first, then bits; None for nothing."""
    first = None
    for placement in job.variant.placements:
        wrong, results = (_forward_results if job.direction == "forward" else _backward_results)(job, placement)
        if wrong:
            return f"{placement}: {wrong}"
        if first and not _equal(results, first, slice(None)):
            return f"{placement}: a row's bits depend on where it starts"
        first = first or results
    return None


def _equal(some, whole, rows):
    return all(torch.equal(part, full[rows]) for part, full in zip(some, whole, strict=True))


def _forward_results(job, placement):
    """(what is wrong, outputs and saved values) of forward; gradients from what it saved tell whether that is right."""
    variant = job.variant
    values_p, values_q, tokens, upstream = _sample(job.vocabulary, variant.dtype, job.device)
    truth = _truth(job.vocabulary, variant.dtype, variant.softcap, variant.upstream, job.device)
    p, q = _placed(values_p, placement, "p"), _placed(values_q, placement, "q")
    outputs, saved = _forward(variant, p, q, tokens)
    grads = {side: _placed(torch.full_like(values_p, math.nan), "aligned", "p") for side in variant.wrt}
    if grads:
        _backward(variant, _placed(values_p, "aligned", "p"), _placed(values_q, "aligned", "q"), tokens, saved, upstream, grads)
    results, wrong = [*outputs.values(), saved], _off(outputs, grads, truth, variant.dtype)
    for rows in PARTS if not wrong else ():
        some, some_saved = _forward(variant, p[rows], q[rows], tokens[rows])
        if not _equal([*some.values(), some_saved], results, rows):
            wrong = "a row's bits depend on the rows beside it"
    return wrong, results


def _backward_results(job, placement):
    """(what is wrong, gradients) of backward."""
    variant = job.variant
    values_p, values_q, tokens, upstream = _sample(job.vocabulary, variant.dtype, job.device)
    truth = _truth(job.vocabulary, variant.dtype, variant.softcap, variant.upstream, job.device)
    saved = _saved(job.vocabulary, variant.dtype, variant.softcap, job.device)
    p, q = _placed(values_p, placement, "p"), _placed(values_q, placement, "q")
    grads, again = ({side: _placed(torch.full_like(values_p, math.nan), placement, "p") for side in variant.wrt} for _ in range(2))
    _backward(variant, p, q, tokens, saved, upstream, grads)
    results, wrong = list(grads.values()), _off({}, grads, truth, variant.dtype)
    for rows in PARTS if not wrong else ():
        some = {side: grad[rows] for side, grad in again.items()}
        _backward(variant, p[rows], q[rows], tokens[rows], saved[rows], {name: value[rows] for name, value in upstream.items()}, some)
        if not _equal(some.values(), results, rows):
            wrong = "a row's bits depend on the rows beside it"
    return wrong, results


# Times ----------------------------------------------------------------------------------------------------------


class Timer:
    """Device times of configurations on this GPU, by operation of TIMED and number of rows: {operation: {rows: milliseconds}}.

    Calls follow each other without a gap, behind a queue that is held until they are all in it, and take turns among rows that together are several
    times the L2 cache. Backward starts from what the present forward saved.
    """

    ROTATE_OVER = 3
    MOST_SETS = 64

    def __init__(self, vocabulary, dtype, device, rows):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26) if device.type == "cuda" else 2**20
        row_bytes = 2 * vocabulary * DTYPES[dtype].itemsize
        sets = {n: min(max(math.ceil(self.ROTATE_OVER * cache / (n * row_bytes)), 1), self.MOST_SETS) for n in rows}
        total = max(n * count for n, count in sets.items())
        inputs = make_inputs(Workload(rows=total, vocabulary=vocabulary, dtype=dtype), device)
        self._p, self._q, self._tokens = inputs.p.detach(), inputs.q.detach(), inputs.tokens
        self._grad = torch.empty_like(self._p)
        self._upstream = {name: torch.randn(total, device=device) for name in ALL}
        self._outputs = {name: torch.empty(total, device=device) for name in ALL}
        self._scratch, self._saved = (torch.empty(total, _rows.SAVED, device=device) for _ in range(2))
        _rows.forward("triton", self._p, self._q, self._tokens, None, 1.0, self._outputs, self._saved)
        self._calls = {(direction, operation): {n: [self._call(direction, *how, slice(i * n, (i + 1) * n)) for i in range(sets[n])] for n in rows}
                       for direction, operations in TIMED.items() for operation, how in operations.items()}

    def _call(self, direction, fields, upstream, wrt, rows):
        """One call of an operation on some of the rows, nothing left to prepare."""
        some = ("triton", self._p[rows], self._q[rows], self._tokens[rows] if "logprob" in fields else None, None, 1.0)
        if direction == "forward":
            return functools.partial(_rows.forward, *some, {name: self._outputs[name][rows] for name in fields}, self._scratch[rows])
        grads = [self._grad[rows] if side in wrt else None for side in "pq"]
        return functools.partial(_rows.backward, *some, self._saved[rows], {name: self._upstream[name][rows] for name in upstream}, *grads)

    def times(self, direction, config, thorough=False):
        """The times of a configuration; thorough: one round of more calls, for a comparison that goes round several times."""
        from fastkl.kernels.config import override

        with override(**{direction: config}):
            return {operation: {rows: _milliseconds(calls, thorough) for rows, calls in by_rows.items()}
                    for (kind, operation), by_rows in self._calls.items() if kind == direction}


def _milliseconds(calls, thorough):
    """Device time of one call."""
    calls[0]()  # compiles, or loads what the workers compiled
    torch.cuda.synchronize()
    estimate, queued = _round(calls[-1:], 1, 2e-3)
    rounds, repetitions = (1, 40 if estimate < 0.5 else 5) if thorough else (3, 20 if estimate < 0.5 else 2)
    return statistics.median(_round(calls, repetitions, 1.5 * queued * repetitions + 2e-4)[0] for _ in range(rounds))


def _round(calls, repetitions, hold):
    """(milliseconds of a call on the device, seconds that it takes to queue one), the queue held for `hold` seconds at its beginning."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hold:
        torch.cuda._sleep(int(min(hold, 0.5) * 2e9))  # cycles, at about 2 GHz
    begun = time.perf_counter()
    start.record()
    for i in range(repetitions):
        calls[i % len(calls)]()
    end.record()
    queued = time.perf_counter() - begun
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repetitions, queued / repetitions
