"""The page of a profile: its tables and HTML."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from bench.nsight import base_name, number
from bench.profile_plots import digits, pictures_of, shortened, with_floor
from bench.trace import Trace, gaps
from nanochat.platform.files import write_atomically, write_json
from nanochat.report.page import Folded, escaped, html_page

SHOWN = 25  # kernels in the table


def write_page(found: dict, launched: Trace, replayed: Trace | None, folder: Path) -> Path:
    """Write profile.json, the pictures and profile.html; returns the page. replayed: None if every kernel of the steps is launched."""
    shown = replayed or launched
    found["steps"] = {"launched": step_facts(launched), **({"replayed": step_facts(replayed)} if replayed else {})}
    pictures = pictures_of(found, launched, shown)
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    write_json(folder / "profile.json", found)
    write_atomically(folder / "profile.html", html_page(title(found), parts(found, shown, set(pictures)), paths))
    return folder / "profile.html"


def title(found: dict) -> str:
    options = found["options"]
    tokens = f"{options['micro_steps']} × {options['rows']} × {options['tokens']} tokens"
    return f"A step of d{options['depth']}, {tokens}, {options['variant']}"


def step_facts(trace: Trace) -> dict:
    """Means over the steps: milliseconds from the first to the last work, of work, of gaps; kernels, gaps."""
    steps = [trace.of_step(number) for number in range(trace.steps)]
    idle = [gaps(step) for step in steps]
    count = len(steps)
    return {
        "ms": sum(max(one.end for one in step) - step[0].start for step in steps) / count / 1e3,
        "busy_ms": sum(one.busy for step in steps for one in step) / count / 1e3,
        "gap_ms": sum(gap for found in idle for gap, _, _ in found) / count / 1e3,
        "kernels": sum(map(len, steps)) / count,
        "gaps": sum(map(len, idle)) / count,
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows)]) + "\n"


def parts(found: dict, shown: Trace, pictures: set[str]) -> list[str | Folded]:
    unit = "kernels" if shown.on_gpu else "operators"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    head = [
        f"# {escaped(title(found))}\n",
        f"`{found['command']}` at commit {found['commit']}, {found['date']}: {escaped(found['device'])}, {escaped(versions)}.\n",
        steps_table(found, unit),
        "## Time by operation\n\n![time by operation](operations.png)\n",
        "Work counts for the operation whose range launched it, or in backward for the operation whose gradient it computes. Other "
        "work has the name of torch's operator.\n",
    ]
    body: list[str | Folded] = ["\n".join(head), Folded("all operations and phases", operations_table(found))]
    if "distance" in pictures:
        body.append(
            "## Distance to the roofline\n\n![distance](distance.png)\n\n![roofline](roofline.png)\n\n"
            f"The floor of an operation is the larger of two times: its least bytes at the rate of a copy on this device "
            f"({found['bandwidth'] / 1e9:,.0f} GB/s), its least FLOPs at the rate of a large matrix product "
            f"({found['peak_flops'] / 1e12:.3g} TFLOP/s). {floor_in_words(found)}\n"
        )
    if "kernels" in pictures:
        body.append(
            "### Kernels by Nsight Compute\n\n![kernels](kernels.png)\n\n" + compute_table(found["nsight_compute"])
        )
    elif shown.on_gpu:
        body.append("Nsight Compute (`ncu`) measured nothing here: no single kernel has a distance of its own.\n")
    body.append("## Launch gaps\n\n![one step and its gaps](timeline.png)\n\n" + gaps_table(shown))
    body.append(
        "## Memory over time\n\n![memory](memory.png)\n\n"
        "The allocator's bytes while all kernels are launched: what is saved for backward, and what each "
        "phase needs besides. A replayed graph uses the same memory, from a pool that stays reserved.\n"
    )
    body.append(f"## {unit.capitalize()}\n\n" + kernels_table(found))
    body += [Folded(f"Nsight Systems: {name}", systems_table(rows)) for name, rows in found["nsight_systems"].items()]
    return body


def floor_in_words(found: dict) -> str:
    rows = with_floor(found)
    floor, time = (sum(row[name] for row in rows) for name in ("floor_ms", "ms"))
    rest = sum(row["ms"] for row in found["operations"]) - time
    return (
        f"All operations together take {digits(time)} ms, and {digits(floor)} ms at their floors ({floor / time:.0%}); what is no "
        f"operation takes {digits(rest)} ms."
    )


def steps_table(found: dict, unit: str) -> str:
    columns = ["step", "ms", f"{unit} busy", "gaps", f"{unit} a step", "tokens/s", "MFU"]
    rows = []
    for name, facts in found["steps"].items():
        rate, peak = 1e3 * found["tokens"] / facts["ms"], found["datasheet_flops"]
        idle = f"{facts['gap_ms']:.2f} ms, {facts['gap_ms'] / facts['ms']:.1%}"
        rows.append(
            [
                name, f"{facts['ms']:.2f}", f"{facts['busy_ms']:.2f} ms", idle, f"{facts['kernels']:,.0f}",
                 f"{rate:,.0f}", f"{rate * found['flops_per_token'] / peak:.1%}" if peak else "",
            ]
        )  # fmt: skip
    note = "\nFrom the first to the last work of a step, with the profiler's own cost; `python -m bench train` times without it.\n"
    return table(columns, rows) + note


def operations_table(found: dict) -> str:
    total = sum(row["ms"] for row in found["operations"])
    shares = {(row["operation"], row["phase"]): f"{row['floor_ms'] / row['ms']:.0%}" for row in with_floor(found)}
    joined = [row for row in with_floor(found) if row not in found["operations"]]
    rows = []
    for row in [*found["operations"], *joined]:
        needs = ["", "", "", "", ""]
        if row.get("floor_ms"):
            needs = [
                f"{row['calls']:.0f}", f"{row['bytes'] / 1e9:.3g}", f"{row['flops'] / 1e12:.3g}", f"{row['floor_ms']:.3g}",
                shares.get((row["operation"], row["phase"]), ""),
            ]  # fmt: skip
        rows.append([row["operation"], row["phase"], f"{row['ms']:.3f}", f"{row['ms'] / total:.1%}", *needs])
    return table(
        ("operation", "phase", "ms", "of the step", "calls", "least GB", "least TFLOP", "floor ms", "of roofline"), rows
    )


def kernels_table(found: dict) -> str:
    total = sum(row["ms"] for row in found["kernels"])
    rows = [
        [
            shortened(row["name"], 48), f"{row['ms']:.3f}", f"{row['ms'] / total:.1%}", f"{row['calls']:.4g}",
            f"{1e3 * row['ms'] / row['calls']:.1f}", owner(row["owners"]),
        ]
        for row in found["kernels"][:SHOWN]
    ]  # fmt: skip
    return table(("name", "ms a step", "share", "calls", "mean µs", "most of it in"), rows)


def owner(owners: list[str]) -> str:
    return owners[0] if len(owners) == 1 else f"{owners[0]} and {len(owners) - 1} more"


def gaps_table(shown: Trace) -> str:
    longest = sorted(gaps(shown.of_step(shown.steps - 1)), key=lambda gap: -gap[0])[:8]
    rows = [
        [
            f"{gap:.1f}",
            *(f"{shortened(base_name(one.name), 36)} ({one.operation or 'unknown'} {one.phase})" for one in around),
        ]
        for gap, *around in longest
    ]
    return "The longest gaps of the step:\n\n" + table(("µs", "after", "before"), rows)


def compute_table(rows: list[dict]) -> str:
    shown = [
        [
            shortened(base_name(row["name"]), 50), row["launches"], f"{row['values'].get('ns', 0) / 1e3:.1f}",
            f"{row['values'].get('bytes', 0) / 1e6:.1f}", f"{row['values'].get('registers', 0):.0f}",
            f"{row['percent_of_roofline']:.0f} %", f"{row['values'].get('ns', 0) / 1e3 * (1 - row['percent_of_roofline'] / 100):.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(("kernel", "launches", "µs", "DRAM MB", "registers", "of its roofline", "µs above it"), shown)


def systems_table(rows: list[dict[str, str]]) -> str:
    """The rows of a report of Nsight Systems: the share, the total and the count, and the last column, which is the name."""
    name = list(rows[0])[-1]
    total = next((column for column in rows[0] if column.startswith("Total Time")), None)
    count = next((column for column in rows[0] if column in ("Instances", "Num Calls")), None)
    shown = [
        [
            shortened(row[name], 60), row.get("Time (%)", ""), f"{number(row[total]) / 1e6:.3f}" if total else "",
            row[count] if count else "",
        ]
        for row in rows[:SHOWN]
    ]  # fmt: skip
    return table(("name", "% of the time", "ms in all", "count"), shown)
