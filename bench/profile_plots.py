"""The pictures of a profile."""

import functools
from collections.abc import Callable, Iterable, Sequence

import matplotlib

matplotlib.use("Agg")  # works without a display

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bench.nsight import base_name
from bench.trace import BACKWARD, FORWARD, OPTIMIZER, OTHER, PHASES, Trace, Work, gaps
from nanochat.report.plots import LOOK

COLORS = {FORWARD: "#1f4e8c", BACKWARD: "#7ea6d8", OPTIMIZER: "#c0862b", OTHER: "#9aa3ae"}
PALETTE = ("#1f4e8c", "#c0862b", "#3c8d8a", "#a4508b", "#7a9a5a", "#c0392b", "#5b86bd", "#8c6d46", "#6c5b9c", "#46708c")
REST = "#c3c9d2"
LEAST_SHARE = 0.005  # of the step: operations below it are drawn together
GAP_BOUNDS = (0, 1, 2, 5, 10, 20, 50, 100, float("inf"))  # µs
WIDTH = 9.0  # inches


def pictures_of(found: dict, launched: Trace, shown: Trace) -> dict[str, Figure]:
    """The pictures by name. launched, shown: the trace whose memory is drawn, and the one whose time is."""
    pictures = {
        "operations": operations_figure(found),
        "timeline": timeline_figure(shown),
        "memory": memory_figure(launched),
    }
    if with_floor(found):
        pictures |= {"distance": distance_figure(found), "roofline": roofline_figure(found)}
    if found["nsight_compute"]:
        pictures["kernels"] = kernels_figure(found["nsight_compute"])
    return pictures


def digits(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def drawn(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that makes a figure, so that it has the look of the reports."""

    @functools.wraps(function)
    def draw(*arguments):
        with plt.rc_context(LOOK | {"axes.axisbelow": True}):
            return function(*arguments)

    return draw


@drawn
def operations_figure(found: dict) -> Figure:
    """A bar for each operation, in parts for its phases."""
    rows = found["operations"]
    total = sum(row["ms"] for row in rows)
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        phases = sums.setdefault(row["operation"], {})
        phases[row["phase"]] = phases.get(row["phase"], 0.0) + row["ms"]
    small = [name for name, phases in sums.items() if sum(phases.values()) < LEAST_SHARE * total]
    rest: dict[str, float] = {}
    for name in small if len(small) > 1 else []:
        for phase, ms in sums.pop(name).items():
            rest[phase] = rest.get(phase, 0.0) + ms
    ordered = sorted(sums.items(), key=lambda item: -sum(item[1].values()))
    ordered += [(f"{len(small)} others", rest)] if rest else []
    figure, axes = plt.subplots(figsize=(WIDTH, 1.1 + 0.32 * len(ordered)), layout="constrained")
    for position, (_, phases) in enumerate(ordered):
        left = 0.0
        for phase in PHASES:
            axes.barh(position, phases.get(phase, 0.0), left=left, color=COLORS[phase], height=0.72)
            left += phases.get(phase, 0.0)
        axes.annotate(f" {digits(left)} ms, {left / total:.1%}", (left, position), va="center", fontsize=8)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * max(sum(phases.values()) for _, phases in ordered))
    axes.set(title="Time by operation", xlabel="ms a step")
    axes.grid(axis="y", visible=False)
    used = [phase for phase in PHASES if any(phases.get(phase, 0.0) > 0.001 * total for _, phases in ordered)]
    axes.legend(handles=[Patch(color=COLORS[phase], label=phase) for phase in used], loc="lower right")
    return figure


def with_floor(found: dict) -> list[dict]:
    """The operations whose floor is known, by phase; both phases as one of an operation that computes gradients in its forward pass."""
    rows = [row for row in found["operations"] if row.get("floor_ms") and row["ms"]]
    early = {row["operation"] for row in rows if row["phase"] == BACKWARD and row["ms"] < row["floor_ms"] / 2}
    for operation in early:
        parts = [row for row in rows if row["operation"] == operation]
        sums = {name: sum(row[name] for row in parts) for name in ("ms", "bytes", "flops", "floor_ms")}
        whole = parts[0] | {"phase": f"{FORWARD} and {BACKWARD}"} | sums
        rows = [whole if row is parts[0] else row for row in rows if row is parts[0] or row["operation"] != operation]
    return sorted(rows, key=lambda row: row["floor_ms"] - row["ms"])


@drawn
def distance_figure(found: dict) -> Figure:
    """How much of its time an operation would take at the roofline, and what that would save."""
    rows = with_floor(found)
    figure, axes = plt.subplots(figsize=(WIDTH, 1.1 + 0.3 * len(rows)), layout="constrained")
    ridge = found["peak_flops"] / found["bandwidth"]
    for position, row in enumerate(rows):
        share = row["floor_ms"] / row["ms"]
        by_memory = row["flops"] < ridge * row["bytes"]
        axes.barh(position, min(100 * share, 108), color=PALETTE[2] if by_memory else PALETTE[0], height=0.72)
        lost = f"{digits(row['ms'] - row['floor_ms'])} ms above" if share <= 1 else "below its floor"
        axes.annotate(f"{share:.0%}, {lost}", (110, position), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['operation']}, {row['phase']}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 140)
    axes.set_xticks(range(0, 101, 20))
    axes.axvline(100, color="#555", linewidth=1)
    axes.set(title="Distance to the roofline", xlabel="floor ÷ time, %")
    axes.grid(axis="y", visible=False)
    handles = [
        Patch(color=PALETTE[0], label="limited by arithmetic"),
        Patch(color=PALETTE[2], label="limited by memory"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


@drawn
def roofline_figure(found: dict) -> Figure:
    """Operations on the roofline; the area of a point is the time that it takes."""
    rows, peak, bandwidth = with_floor(found), found["peak_flops"], found["bandwidth"]
    figure, axes = plt.subplots(figsize=(WIDTH, 5), layout="constrained")
    points = [
        (row, max(row["flops"], 1) / row["bytes"], row["flops"] / row["ms"] * 1e3) for row in rows if row["flops"]
    ]
    low = min((x for _, x, _ in points), default=1) / 3
    high = 3 * max([x for _, x, _ in points] + [peak / bandwidth])
    ends = [low, peak / bandwidth, high]
    axes.loglog(ends, [min(x * bandwidth, peak) / 1e12 for x in ends], color="#333", zorder=1)
    total = sum(row["ms"] for row in found["operations"])
    names = list(dict.fromkeys(row["operation"] for row, _, _ in points))
    for row, x, y in points:
        color = PALETTE[names.index(row["operation"]) % len(PALETTE)]
        face = color if row["phase"] == FORWARD else "none" if row["phase"] == BACKWARD else color
        axes.scatter(
            x, y / 1e12, s=30 + 1500 * row["ms"] / total, facecolors=face, edgecolors=color, alpha=0.85, zorder=2
        )
    handles = [Patch(color=PALETTE[i % len(PALETTE)], label=name) for i, name in enumerate(names)]
    axes.legend(
        handles=handles,
        loc="lower right",
        fontsize=8,
        title="filled: forward or update; open: backward",
        title_fontsize=8,
    )
    axes.set(title="Roofline", xlabel="FLOPs per byte that must be moved", ylabel="TFLOP/s")
    text = f"copy {bandwidth / 1e9:,.0f} GB/s, matrix product {peak / 1e12:.3g} TFLOP/s"
    axes.annotate(text, (0.02, 0.95), xycoords="axes fraction", fontsize=8)
    return figure


@drawn
def timeline_figure(trace: Trace) -> Figure:
    """The last step: its work in the colours of the operations, and its gaps by their length."""
    work = trace.of_step(trace.steps - 1)
    start = work[0].start
    totals: dict[str, float] = {}
    for one in work:
        totals[one.operation] = totals.get(one.operation, 0.0) + one.busy
    largest = sorted(totals, key=totals.get, reverse=True)[: len(PALETTE)]
    colors = dict(zip(largest, PALETTE, strict=False))
    figure, (axes, histogram) = plt.subplots(2, 1, figsize=(WIDTH, 4.4), layout="constrained", height_ratios=[1, 1.25])
    lanes = {OPTIMIZER: 0, BACKWARD: 1, FORWARD: 2, OTHER: 0}
    for color in (*colors.values(), REST):
        for phase in PHASES:
            bars = [
                ((one.start - start) / 1e3, (one.end - one.start) / 1e3)
                for one in outermost(work)
                if colors.get(one.operation, REST) == color and one.phase == phase
            ]
            if bars:
                axes.broken_barh(bars, (lanes[phase] - 0.4, 0.8), facecolors=color, linewidth=0)
    axes.set_yticks([0, 1, 2], ["optimizer, other", "backward", "forward"])
    axes.set_ylim(-0.6, 2.6)
    axes.set(title="One step", xlabel="ms")
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=color, label=name or "unknown") for name, color in colors.items()]
    axes.legend(
        handles=[*handles, Patch(color=REST, label="rest")],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.32),
        ncols=4,
        fontsize=7.5,
    )
    idle = [gap for gap, _, _ in gaps(work)]
    bounds = list(zip(GAP_BOUNDS, GAP_BOUNDS[1:], strict=False))
    sums = [sum(gap for gap in idle if low <= gap < high) / 1e3 for low, high in bounds]
    counts = [sum(low <= gap < high for gap in idle) for low, high in bounds]
    names = [f"{low:g}-{high:g}" if high < float("inf") else f"over {low:g}" for low, high in bounds]
    bars = histogram.bar(names, sums, color=PALETTE[0], width=0.7)
    histogram.bar_label(bars, [f"{count} gaps" if count else "" for count in counts], fontsize=7.5, padding=1)
    histogram.set_ylim(0, 1.2 * max([*sums, 1e-3]))
    histogram.set(
        title=f"Gaps in which nothing ran: {digits(sum(idle) / 1e3)} ms in all",
        xlabel="length of a gap, µs",
        ylabel="ms a step",
    )
    histogram.grid(axis="x", visible=False)
    return figure


def outermost(work: Sequence[Work]) -> Iterable[Work]:
    """The work that is not inside of other work, which on a CPU an operator is that another one calls."""
    end = float("-inf")
    for one in work:
        if one.end > end:
            yield one
            end = one.end


@drawn
def memory_figure(trace: Trace) -> Figure:
    """Allocated bytes over the launched steps, with the phases behind them."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3), layout="constrained")
    if trace.memory:
        start = trace.memory[0][0]
        times = [(time - start) / 1e3 for time, _ in trace.memory]
        axes.step(times, [size / 1e9 for _, size in trace.memory], where="post", color="#22252a", linewidth=1.1)
        for phase, begin, end in trace.phases:
            axes.axvspan((begin - start) / 1e3, (end - start) / 1e3, color=COLORS[phase], alpha=0.22, linewidth=0)
        axes.set_xlim(0, times[-1])
        axes.set_ylim(bottom=0)
    handles = [Patch(color=COLORS[phase], alpha=0.3, label=phase) for phase in (FORWARD, BACKWARD, OPTIMIZER)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    unit = "GB" + ("" if trace.on_gpu else " since the start of the profile")
    axes.set(title=f"Memory of {trace.steps} launched steps", xlabel="ms on the host", ylabel=unit)
    return figure


@drawn
def kernels_figure(rows: list[dict]) -> Figure:
    """What Nsight Compute measured of each kernel: how busy arithmetic and memory were."""
    ordered = sorted(rows, key=lambda row: -row["values"].get("ns", 0) * row["launches"])
    figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.45 * len(ordered)), layout="constrained")
    shown = (
        ("compute_percent", "arithmetic", PALETTE[0]),
        ("memory_percent", "memory and caches", PALETTE[2]),
        ("dram_percent", "DRAM", "#a9cfcd"),
    )
    for offset, (name, label, color) in enumerate(shown):
        values = [row["values"].get(name, 0.0) for row in ordered]
        bars = axes.barh([i + 0.26 * (offset - 1) for i in range(len(ordered))], values, 0.24, color=color, label=label)
        axes.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=7, padding=2)
    axes.set_yticks(range(len(ordered)), [shortened(base_name(row["name"]), 44) for row in ordered])
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.set(title="Kernels by Nsight Compute", xlabel="of the unit's peak, while the kernel runs")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
