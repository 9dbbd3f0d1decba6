"""The sections of gpu_suite.py inside their own process: a section is a list of steps, and a step makes the rows of one provider at one workload."""
import functools
import gc
import time
from dataclasses import asdict, dataclass

from benchmarks import accuracy, harness
from benchmarks.linear_providers import LINEAR_LOADERS
from benchmarks.providers import ALL_LOADERS, LOADERS, Provider, load_providers

NO_TIME = "no time left in this run"
EVERYBODY = "all"
LEFT_OUT = "left out after it had broken the CUDA context in this section"
# What an error says that every later call in the process meets too.
STICKY = ("CUDA error", "illegal memory access", "unspecified launch failure")


@dataclass(frozen=True)
class Step:
    """A workload and the name of the provider to measure at it; options: of harness.measure."""

    workload: object
    provider: str
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class AccuracyCase:
    """A size of the KL and an element type, for all kinds of rows (benchmarks/accuracy.py)."""

    dtype: str
    target: float

    def as_dict(self):
        """The case as it stands in the results."""
        return {"name": f"accuracy-{self.dtype}-{self.target:g}", **asdict(self)}


def steps(workloads, providers, **options):
    """The steps of all providers at each workload."""
    return [Step(workload, provider, tuple(options.items())) for workload in workloads for provider in providers]


def no_figures(workload, provider, status, reason):
    """A row that only says why there are no figures."""
    return {"workload": workload.as_dict(), "provider": provider, "status": status, "reason": reason}


def _late(step):
    return no_figures(step.workload, step.provider, "missing", NO_TIME)


def _missing(step, provider):
    """The row of a provider that is not there or does not have the operation; None for one that has."""
    why = provider.why_not(step.workload.operation)
    return why and harness.empty_row(step.workload, step.provider, "missing", why)


def _loader(device, loaders, without):
    """A function from a name to its provider, each loaded when it is first asked for: some take seconds to import."""
    @functools.cache
    def get(name):
        if name in without:
            return Provider(name, missing=LEFT_OUT)
        (provider,) = load_providers(device, [name], loaders)
        if device.type == "cuda":
            # What a package brought with it stays: the collection of garbage after each row need not go through it.
            gc.collect()
            gc.freeze()
        return provider

    return get


def logits_rows(steps, device, deadline, without=()):
    """Yields the rows of each step, of operations on logits; the first has the bandwidth of a copy before it. Past the deadline rows that say so."""
    copy = harness.copy_bandwidth(device) if device.type == "cuda" else None
    get, case, rows = _loader(device, ALL_LOADERS, without), None, [{"copy": copy}] if copy else []
    for step in steps:
        if time.monotonic() > deadline:
            yield [*rows, _late(step)]
        else:
            provider = get(step.provider)
            if missing := _missing(step, provider):
                rows.append(missing)
            else:
                try:
                    if case is None or case.workload != step.workload:
                        case = None
                        harness.release()
                        case = harness.make_case(step.workload, device, copy and copy["gb_per_s"])
                    rows.append(harness.measure(provider, case, **dict(step.options)))
                except Exception as error:  # inputs that do not fit, above all
                    rows.append(_failed(step, error))
            yield rows
            harness.release()
        rows = []


def linear_rows(steps, device, deadline, without=()):
    """The same for a LinearWorkload, each with the row of the floor before its first. What the gate compares with and the floor are made once."""
    get, case, floor, known = _loader(device, LINEAR_LOADERS, without), None, None, {}
    for number, step in enumerate(steps):
        if time.monotonic() > deadline:
            yield [_late(step)]
            continue
        rows, provider = [], get(step.provider)
        if missing := _missing(step, provider):
            rows.append(missing)
        else:
            try:
                if case is None or case.workload != step.workload:
                    case = None
                    harness.release()
                    expected, floor = known.pop(step.workload, (None, None))
                    case = harness.make_linear_case(step.workload, device, expected)
                    if floor is None and device.type == "cuda":
                        floor = harness.measure_floor(case)
                        rows.append(floor)
                if any(step.workload == later.workload for later in steps[number + 1:]):
                    known[step.workload] = case.expected, floor
                rows.append(harness.measure_linear(provider, case, floor))
            except Exception as error:
                rows.append(_failed(step, error))
        yield rows
        harness.release()


def _failed(step, error):
    return no_figures(step.workload, step.provider, "failed", f"{type(error).__name__}: {error}"[:2000])


def accuracy_rows(steps, device, deadline, without=()):
    """Yields the records of each AccuracyCase, with the errors of all providers."""
    get = _loader(device, LOADERS, without)
    providers = [get(name) for name in LOADERS]
    for step in steps:
        if time.monotonic() > deadline:
            yield [_late(step)]
        else:
            yield list(accuracy.accuracy(providers, device, targets=(step.workload.target,), dtypes=(step.workload.dtype,)))


def culprit(records):
    """The provider whose error is the first that broke the CUDA context, in records of accuracy; None where none is."""
    for record in records:
        for name, error in record.get("errors", {}).items():
            if any(mark in str(error.get("reason", "")) + str(error.get("gradient_reason", "")) for mark in STICKY):
                return name
    return None
