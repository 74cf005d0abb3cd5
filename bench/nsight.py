"""Runs Nsight Systems and Nsight Compute over a few steps where they are installed, and reads what they found."""

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanochat.platform.console import say

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds for each of the two
# that name the same thing on every GPU since Volta, in base units: ns, bytes, percent
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "launch__registers_per_thread": "registers",
}
REPORTS = ("cuda_gpu_kern_sum", "nvtx_sum", "cuda_api_sum")


@dataclass(frozen=True)
class Measured:
    """A kernel as Nsight Compute measured it: the means of its launches."""

    name: str
    launches: int
    values: dict[str, float]  # by the short names of METRICS

    @property
    def percent_of_roofline(self) -> float:
        """How much of the peak the unit that limits it reaches: the arithmetic, or the memory with its caches."""
        return max(self.values.get("compute_percent", 0.0), self.values.get("memory_percent", 0.0))


def steps_command(options: dict[str, object], **more: object) -> list[str]:
    """The command that trains the profiled steps."""
    given = [(name, value) for name, value in {**options, **more}.items() if value is not False]
    parts = [
        part
        for name, value in given
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    return [sys.executable, "-m", "bench.profiled_steps", *parts]


def run(tool: str, arguments: list[str]) -> str | None:
    """Run a tool; returns what it printed, or None, with a line that says why, if it is not there or fails."""
    path = shutil.which(tool)
    if path is None:
        say(f"{tool} is not on the PATH: the page goes without it")
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        say(f"{tool} did not end within {TIMEOUT} s: the page goes without it")
        return None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        say(f"{tool} failed ({last}): the page goes without it")
        return None
    return done.stdout


def systems(options: dict[str, object], folder: Path) -> dict[str, list[dict[str, str]]]:
    """Record the steps with Nsight Systems, as training replays them; returns its reports' rows by name, none where it is missing.

    The recording stays in the folder, as steps.nsys-rep.
    """
    recording = folder / "steps.nsys-rep"
    arguments = [
        "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
        "--force-overwrite=true", f"--output={recording.with_suffix('')}", *steps_command(options),
    ]  # fmt: skip
    if run("nsys", arguments) is None:
        return {}
    found = {}
    for report in REPORTS:
        text = run(
            "nsys", ["stats", "--force-export=true", "--format=csv", "--output=-", f"--report={report}", str(recording)]
        )
        rows = read_csv(text or "")
        if rows:
            found[report] = rows
    return found


def compute(options: dict[str, object], names: Iterable[str]) -> list[Measured]:
    """Measure the kernels of these names with Nsight Compute, in a launched step of a model with one layer; none if it is missing."""
    pattern = "|".join(sorted({re.escape(base_name(name)) for name in names}))
    arguments = [
        "--profile-from-start=off", "--clock-control=none", "--csv", "--page=raw", "--print-units=base",
        f"--metrics={','.join(METRICS)}", f"--kernel-name=regex:^({pattern})$",
        *steps_command(options | {"layers": 1, "steps": 1}, launched=True),
    ]  # fmt: skip
    text = run("ncu", arguments)
    return measured(read_csv(text)) if text else []


def base_name(kernel: str) -> str:
    """The name of a kernel without its type, namespaces, template arguments and parameters, by which Nsight Compute chooses."""
    before = re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0]
    return before.rpartition("::")[2].strip() or kernel


def measured(rows: list[dict[str, str]]) -> list[Measured]:
    """The means over the launches of each kernel. The first row of Nsight Compute's has units, and no number of a launch."""
    by_name: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        if row.get("ID", "").strip():
            values = {short: number(row[metric]) for metric, short in METRICS.items() if row.get(metric, "").strip()}
            by_name.setdefault(row["Kernel Name"], []).append(values)
    return [
        Measured(name, len(all_), {key: sum(one[key] for one in all_) / len(all_) for key in all_[0]})
        for name, all_ in by_name.items()
    ]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def read_csv(text: str) -> list[dict[str, str]]:
    """The rows of the table in a tool's output, around which it prints lines of its own."""
    lines = text.splitlines()
    first = next(
        (i for i, line in enumerate(lines) if line.startswith(('"ID"', "ID,", "Time (%)", '"Time (%)"'))), None
    )
    if first is None:
        return []
    table = [line for line in lines[first:] if line.strip() and not line.startswith("==")]
    return list(csv.DictReader(table))
