"""Search launch parameters for the kernels of one training run, where the table's were measured on another GPU model.

The run's step is recorded on the meta device: which kernels it launches, how often, and at which shapes. Those that take most of
its time are searched first, until the time is up. Configurations compile side by side; all are timed once, and the fastest few again
as `nanochat kernels tune` does. The committed parameters take part, so that what is found is no slower here.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from statistics import median
from typing import NamedTuple

import torch

from nanochat_kernels import ahead, configs, inspect, timing, tune
from nanochat_kernels.architecture import architecture
from nanochat_kernels.dispatch import KernelRequestError, tunable_kernels
from nanochat_kernels.operation import Kernel, Key

FINALISTS = 4  # configurations that are timed again
Parameters = dict[str, int]


class Case(NamedTuple):
    """A kernel at the dtype and the key of a call."""

    name: str
    dtype: torch.dtype
    key: Key

    @property
    def kernel(self) -> Kernel:
        return next(kernel for kernel in tunable_kernels() if kernel.name == self.name)

    def __str__(self) -> str:
        return f"{self.name} {configs.dtype_name(self.dtype)} {configs.format_key(self.key)}"


class Found(NamedTuple):
    """What a search found: launch parameters as in a table, and the cases that are left with the committed ones."""

    architecture: str
    launch: dict[str, dict[str, dict[str, Parameters]]]
    left: list[str]


def measured_elsewhere(architecture: str, card: str) -> set[str]:
    """Return the kernels whose parameters in an architecture's table were measured on another GPU model than `card`."""
    table = configs.table(architecture)
    others = table.get("measured_elsewhere", {})
    return {kernel for kernel in table["launch"] if others.get(kernel, table["measured_on"]) != card}


def cases_of(works: Iterable[Callable[[], object]], architecture: str, names: set[str]) -> dict[Case, int]:
    """Return what works on meta tensors launch of the kernels with these names and a choice of configurations, and how often.

    Of what several works launch the first one counts. A work that asks for an implementation that cannot serve it is left out.
    """
    names = {kernel.name for kernel in tunable_kernels() if kernel.name in names and len(kernel.space) > 1}
    found: dict[Case, int] = {}
    for work in works:
        with configs.tables_of(architecture), configs.counted_lookups() as lookups:
            try:
                ahead.launches_of(work)
            except KernelRequestError:
                continue
        for (name, dtype, key), count in lookups.items():
            if name in names:
                found.setdefault(Case(name, dtype, key), count)
    return found


def search(
    works: Iterable[Callable[[], object]], seconds: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Found:  # fmt: skip
    """Search the parameters of the kernels that works on meta tensors launch and the table has not measured on this GPU model.

    works: the training step, then others whose kernels are searched too, such as those of implementations that "auto" does not take.
    seconds: after so many no further search begins.
    """
    deadline = clock() + seconds
    device = torch.device("cuda", torch.cuda.current_device())
    name = architecture(device.index)
    launch, left = {}, []
    names = measured_elsewhere(name, tune.card_here(name))
    counts = cases_of(works, name, names) if names else {}
    committed = {case: configs.parameters_in(name, case.name, case.dtype, case.key) for case in counts}
    compile_all([(case, [parameters]) for case, parameters in committed.items()], name, device, sets=1)
    cost = {case: count * milliseconds(case, committed[case], device) for case, count in counts.items()}
    for case in sorted(cost, key=cost.__getitem__, reverse=True):
        if clock() >= deadline:
            left.append(f"{case}: the {seconds:.0f} s were over")
            continue
        try:
            before, ms, parameters = best(case, committed[case], name, device, say)
        except Exception as error:  # whatever a kernel fails with on this machine, the committed parameters stay
            left.append(f"{case}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        finally:
            torch.cuda.empty_cache()
        launch.setdefault(case.name, {}).setdefault(configs.dtype_name(case.dtype), {})[
            configs.format_key(case.key)
        ] = parameters
        say(f"{case}: {ms:.4f} ms with {parameters}, {before:.4f} with those of the launch table")
    return Found(name, launch, left)


def best(
    case: Case, committed: Parameters, name: str, device: torch.device, say: Callable[[str], None]
) -> tuple[float, float, Parameters]:
    """Return the milliseconds of the committed parameters and of the fastest, and the fastest.

    Raises inspect.CannotRun where none compiles without a defect, and torch.OutOfMemoryError where the inputs do not fit.
    """
    others = [
        parameters for parameters in case.kernel.space if tune.is_for(parameters, name) and parameters != committed
    ]
    candidates = [committed, *others]
    compile_all([(case, candidates)], name, device, sets=1)
    times = first_look(case, candidates, device)
    finalists = [candidates[i] for i in sorted(times, key=times.__getitem__)[:FINALISTS]]
    compile_all([(case, finalists)], name, device)
    ms, parameters = tune.fastest(case.kernel, case.key, case.dtype, name, finalists, say)
    return times.get(0, float("nan")), ms, parameters


def milliseconds(case: Case, committed: Parameters, device: torch.device) -> float:
    """Return the time with the committed parameters; 0 where they cannot be launched, so that the case is searched last."""
    try:
        return first_look(case, [committed], device).get(0, 0.0)
    except Exception:  # such as inputs that do not fit into the memory; the search will say so
        return 0.0


def first_look(case: Case, candidates: list[Parameters], device: torch.device) -> dict[int, float]:
    """Return the median milliseconds of those candidates that can be launched, by their number."""
    run = tune.timed(case.kernel, case.key, case.dtype, device)
    able = {}
    for number, parameters in enumerate(candidates):
        try:
            run(parameters)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # for example a tile that the compiler rejects, or more shared memory than there is
            continue
        able[str(number)] = lambda _, parameters=parameters: run(parameters)
    samples = timing.interleaved(able, 3) if able else {}
    return {int(number): median(values) for number, values in samples.items()}


def compile_all(
    jobs: Iterable[tuple[Case, list[Parameters]]], name: str, device: torch.device, sets: int | None = None
) -> None:
    """Compile each case with each of its parameters side by side, in every set of flags or in the first `sets` of them.

    What does not compile is left to its launch to report.
    """
    with suppress(Exception):
        ahead.compile_side_by_side(launches_of(jobs, name, sets), device)


def launches_of(jobs: Iterable[tuple[Case, list[Parameters]]], name: str, sets: int | None) -> Iterator:
    with configs.tables_of(name):
        for case, candidates in jobs:
            for parameters in candidates:
                try:
                    recorded = inspect.record(case.kernel, case.key, case.dtype, parameters)
                except Exception:  # what cannot be launched is left out when it is timed
                    continue
                for launches in list(recorded.values())[:sets]:
                    yield from launches
