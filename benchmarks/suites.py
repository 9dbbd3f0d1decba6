"""List the sections of speed.py, cases with providers, in their order."""

from typing import NamedTuple

from benchmarks.cases import OUTPUTS, Workload
from benchmarks.linear_cases import FLOOR, LinearWorkload
from benchmarks.peers import LINEAR_PEERS
from benchmarks.providers import LOADERS
from benchmarks.work import FAMILY, ONE_TENSOR, PRODUCTS, TOPK


class Section(NamedTuple):
    """Cases, most important first, and the providers measured on them."""

    workloads: tuple
    providers: tuple[str, ...]


def _sizes(**sizes):
    return tuple(Workload(**{name: size}) for name, values in sizes.items() for size in values)


MAIN = (
    *(Workload("kl_divergence", wrt=wrt) for wrt in "pq"),
    Workload("token_stats"),
    *(Workload("mean_kl", wrt=wrt) for wrt in "pq"),
)
LOGPROBS = (
    Workload("logprob"),
    Workload("logprob", layout="sliced"),
    Workload("logprob_entropy"),
    Workload("entropy"),
)
DIVERGENCES = tuple(Workload(operation, wrt="q") for operation in ("mean_js", *FAMILY))
SWEEP = (
    *_sizes(rows=(8, 64, 512, 2048), vocabulary=(32000, 50257, 151936)),
    *(Workload(dtype="fp32"), Workload(layout="sliced"), Workload(vocabulary=262144)),
)
LINEAR_SHAPES = (
    *({"rows": n} for n in (64, 512, 2048)),
    *({"vocabulary": v} for v in (32000, 50257, 151936)),
    *({"hidden": h} for h in (1024, 2048)),
    *({"rows": 16384}, {"hidden": 8192}, {"vocabulary": 262144}),  # the longest last
)
SCALING = (
    *_sizes(rows=[2**k for k in range(16) if 2**k != 4096]),
    *(Workload(rows=4096, vocabulary=v) for v in (1000, 4096, 16384, 32000, 50257, 65536)),
    *(Workload(rows=4096, vocabulary=v) for v in (128256, 151936, 262144)),
)
SMALL = {"rows": 16, "vocabulary": 131}
# Operations without a gradient to the other logits.
ONE_SIDED = {TOPK: "q", "token_stats": "p", **dict.fromkeys(ONE_TENSOR, "p")}
SMOKE = (
    *(
        Workload(operation, dtype=dtype, wrt=ONE_SIDED.get(operation, "p"), **SMALL)
        for operation in OUTPUTS
        for dtype in ("bf16", "fp32")
    ),
    *(
        Workload(operation, wrt=ONE_SIDED.get(operation, "q"), layout="sliced", **SMALL)
        for operation in OUTPUTS
    ),
    *(LinearWorkload(mode, 24, 32, 257, dtype) for mode in PRODUCTS for dtype in ("bf16", "fp32")),
)

# torch.compile is always last: it compiles for seconds per shape, and time may run out.
COMPILED = "torch.compile"
FROM_LOGITS = tuple(name for name in LOADERS if name != COMPILED)
FROM_HIDDEN = ("fastkl", "torch", "fastkl, logits kept", "torch chunked", *LINEAR_PEERS)
EVERYBODY = tuple(dict.fromkeys((*FROM_LOGITS, *FROM_HIDDEN)))

# In order of importance: the main shape first.
SUITES = {
    "main": Section(MAIN, ("fastkl", "torch", COMPILED)),
    "fused": Section(
        (Workload("mean_kl"), Workload("mean_kl", rows=64), Workload("mean_kl", rows=8)),
        ("fastkl, one launch", "fastkl"),
    ),
    "linear": Section(
        tuple(LinearWorkload(mode) for mode in PRODUCTS), (FLOOR, *FROM_HIDDEN, COMPILED)
    ),
    "peers": Section((*MAIN[3:], *LOGPROBS), (*FROM_LOGITS, COMPILED)),
    "divergences": Section(DIVERGENCES, (*FROM_LOGITS, COMPILED)),
    "sweep": Section(SWEEP, ("fastkl", "torch", COMPILED)),
    "linear_sweep": Section(
        tuple(
            LinearWorkload(mode, **shape) for shape in LINEAR_SHAPES for mode in ("loss", "forward")
        ),
        (FLOOR, "fastkl"),
    ),
    "scaling": Section(SCALING, ("fastkl", "torch")),
    "smoke": Section(SMOKE, EVERYBODY),
}
# "smoke" is for tests and `make bench`: tiny shapes of everything, to check, not to time.
ALL = tuple(name for name in SUITES if name != "smoke")
