"""Profile a few steps of training, and write one page: time by operation, distance to the roofline, launch gaps, memory over time.

torch.profiler records two runs: one in which every kernel is launched, inside of the ranges that say whose it is, and one as in
training, where CUDA graphs are replayed. Nsight Systems and Nsight Compute are used where they are installed. On a CPU, the
operators of torch take the place of kernels.
"""

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import nanochat_kernels as kernels
from bench import nsight
from bench.measure import header, peaks
from bench.profile_page import write_page
from bench.profiled_steps import ProfiledSteps, ProfiledStepsConfig
from bench.trace import BACKWARD, FORWARD, OPTIMIZER, Trace, Work, named_by_order, read_trace
from bench.variants import parse
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime, start_runtime
from nanochat.platform.errors import UserError
from nanochat_kernels.ranges import recorded


@dataclass(frozen=True)
class ProfileConfig(ProfiledStepsConfig):
    """Profile training, and write a page about it."""

    launched: bool = False
    """profile only the run in which every kernel is launched"""
    kernels: int = 8
    """kernels that Nsight Compute measures, those that take the most time; 0: none"""
    nsight: bool = True
    """run Nsight Systems and Nsight Compute where they are installed"""
    out: Path = Path("build/profile")
    """folder of the page, its pictures, profile.json and the recordings"""


@dataclass
class Need:
    """The least that the calls of an operation in a step must do, in one phase."""

    bytes: float = 0.0
    flops: float = 0.0
    calls: int = 0
    floor_ms: float = 0.0  # at the peaks of the device


@dataclass
class Needs:
    """Adds up what the operations of a step need, from the arguments of their calls and their records."""

    bandwidth: float  # bytes per second
    peak: float  # FLOP per second
    found: dict[tuple[str, str], Need] = field(default_factory=dict)

    def observe(self, name: str, arguments: tuple) -> None:
        benchmark = kernels.operations()[name].benchmark
        tensors = tuple(x for x in arguments if isinstance(x, Tensor))
        if benchmark is None:  # elementwise, with a small part of the time: each argument is read once
            return self._add(name, OPTIMIZER, float(sum(x.nbytes for x in tensors)), 0.0)
        arguments = tensors if benchmark.variants else arguments
        for part in ("fwd", "bwd") if torch.is_grad_enabled() else ("fwd",):
            least = min(benchmark.flops(arguments, part, variant) for variant in ("eager", "triton"))
            phase = BACKWARD if part == "bwd" else FORWARD if torch.is_grad_enabled() else OPTIMIZER
            self._add(name, phase, benchmark.elements(arguments, part) * tensors[0].dtype.itemsize, least)

    def _add(self, name: str, phase: str, size: float, flops: float) -> None:
        need = self.found.setdefault((name, phase), Need())
        need.bytes += size
        need.flops += flops
        need.calls += 1
        need.floor_ms += 1e3 * max(size / self.bandwidth, flops / self.peak)


def recorded_steps(config: ProfiledStepsConfig, runtime: Runtime, needs: Needs | None) -> Trace:
    """Train the steps under torch.profiler; returns the trace. needs: collects those of all steps."""
    steps = ProfiledSteps(config, runtime.device, runtime.compute_dtype)
    on_gpu = runtime.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with (
        recorded(steps.training.model.blocks, needs.observe if needs else None),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
    ):
        steps.run()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = read_trace(json.loads(path.read_text("utf-8")), set(kernels.operations()))
    if on_gpu and not trace.on_gpu:
        raise UserError(
            "torch.profiler recorded no kernel: no other profiler may watch this GPU, and CUPTI must be there"
        )
    del steps
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return trace


def by_operation(work: list[Work], steps: int) -> dict[tuple[str, str], float]:
    """Milliseconds of a step by operation and phase."""
    found: dict[tuple[str, str], float] = {}
    for one in work:
        if one.step >= 0:
            key = one.operation or "unknown", one.phase
            found[key] = found.get(key, 0.0) + one.busy / 1e3 / steps
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def by_kernel(work: list[Work], steps: int) -> list[dict]:
    """The kernels of a step by the time that they take: name, the operation and phase that have most of it, calls, milliseconds."""
    found: dict[str, dict] = {}
    for one in work:
        if one.step < 0:
            continue
        row = found.setdefault(one.name, {"name": one.name, "ms": 0.0, "calls": 0.0, "owners": {}})
        row["ms"] += one.busy / 1e3 / steps
        row["calls"] += 1 / steps
        owner = f"{one.operation or 'unknown'} {one.phase}"
        row["owners"][owner] = row["owners"].get(owner, 0.0) + one.busy
    rows = sorted(found.values(), key=lambda row: -row["ms"])
    return [row | {"owners": sorted(row["owners"], key=row["owners"].get, reverse=True)} for row in rows]


def profile(config: ProfileConfig, command: str) -> None:
    """Record, analyse and write the page. Raises UserError for bad options, and where the device is not available."""
    if config.steps < 1 or config.micro_steps < 1:
        raise UserError(f"--steps and --micro-steps must be at least 1, got {config.steps} and {config.micro_steps}")
    parse(config.variant)
    config.out.mkdir(parents=True, exist_ok=True)
    names = [one.name for one in fields(ProfiledStepsConfig)]
    options = {name: getattr(config, name) for name in names if name != "launched"}
    with start_runtime(config.device) as runtime:
        on_gpu = runtime.device.type == "cuda"
        found = header(command, on_gpu)
        bandwidth, peak = peaks(runtime.device)
        needs = Needs(bandwidth, peak)
        launched = recorded_steps(ProfiledStepsConfig(**options, launched=True), runtime, needs)
        replays = on_gpu and not config.launched and parse(config.variant).execution == "graph"
        shown = launched
        if replays:
            shown = recorded_steps(ProfiledStepsConfig(**options), runtime, None)
            shown.work = named_by_order(launched.work, shown.work)
        flops = config.shape.flops_per_token
    rows = by_kernel(shown.work, config.steps)
    ran = {"systems": {}, "compute": []}
    if config.nsight and on_gpu:
        ran["systems"] = nsight.systems(options, config.out)
        if config.kernels:
            ran["compute"] = nsight.compute(options, [row["name"] for row in rows[: config.kernels]])
    del found["rows"]
    found |= {
        "options": options,
        "tokens": config.rows * config.tokens * config.micro_steps,
        "flops_per_token": flops,
        "datasheet_flops": runtime.peak_flops,
        "bandwidth": bandwidth,
        "peak_flops": peak,
        "operations": _rows(by_operation(shown.work, config.steps), needs.found, config.steps),
        "kernels": rows,
        "nsight_compute": [asdict(one) | {"percent_of_roofline": one.percent_of_roofline} for one in ran["compute"]],
        "nsight_systems": ran["systems"],
    }
    say(f"wrote {write_page(found, launched, shown if replays else None, config.out)}")


def _rows(times: Mapping[tuple[str, str], float], needs: Mapping[tuple[str, str], Need], steps: int) -> list[dict]:
    """The operations of a step, each phase with its milliseconds and, where it is known, what it needs at least."""
    rows = []
    for (operation, phase), ms in times.items():
        row = {"operation": operation, "phase": phase, "ms": ms}
        need = needs.get((operation, phase))
        if need:
            row |= {"calls": need.calls / steps, "bytes": need.bytes / steps, "flops": need.flops / steps}
            row |= {"floor_ms": need.floor_ms / steps}
        rows.append(row)
    return rows
