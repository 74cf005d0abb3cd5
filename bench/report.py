"""Write a report of results: tables, a chart of the ratio to every baseline, and a roofline with every kernel."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # works without a display

from matplotlib import pyplot as plt

from bench.compare import load, read_result
from nanochat.platform.files import write_atomically
from nanochat.report.page import html_page

OURS = "triton"
BASELINES = {
    "eager": "#b9cde8",
    "compile": "#1f4e8c",
    "max-autotune": "#5b86bd",
    "liger": "#c0862b",
    "quack": "#a4508b",
    "helion": "#3c8d8a",
    "loop": "#7a9a5a",
}


def write_report(results: tuple[Path, ...], out: Path) -> Path:
    """Write report.md, report.html (with its pictures inside), ratios.png and roofline.png; returns the HTML file."""
    rows = [row for path in results for row in load(path).values()]
    headers = [read_result(path) for path in results]
    out.mkdir(parents=True, exist_ok=True)
    plot_ratios(rows, out / "ratios.png")
    plot_roofline(rows, max(h["product_tflops"] for h in headers), out / "roofline.png")
    text = markdown(headers, rows)
    write_atomically(out / "report.md", text)
    write_atomically(
        out / "report.html", html_page("Fused kernels", [text], (out / "ratios.png", out / "roofline.png"))
    )
    return out / "report.html"


def markdown(headers: list[dict], rows: list[dict]) -> str:
    lines = ["# Fused kernels: time, bandwidth, baselines", ""]
    for header in headers:
        versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
        lines += [
            f"- `{header['command']}` at commit {header['commit']}, {header['date']}: {header['device']}, {versions}; "
            f"matrix product {header['product_tflops']:.0f} TFLOP/s"
        ]
    lines += [
        "",
        "Time is the median of GPU time with a cold L2 cache, variants taking turns; a ratio below 1 means that",
        "the fused kernel is faster. Launch is the processor's time to hand a call to an idle GPU. TFLOP/s are executed ones (in",
        "brackets: those of the plain algorithm in the same time); `loop` is the compiled reference, matrix by matrix.",
        "",
    ]
    lines += ["![ratio to each baseline](ratios.png)", "", "![roofline](roofline.png)", ""]
    for operation in dict.fromkeys(row["op"] for row in rows):
        lines += [
            f"## {operation}",
            "",
            "| case | impl | ms | quartiles | GB/s | % of copy | TFLOP/s | fused is × of it | launch µs | transient MB |",
        ]
        lines += ["|" + "---|" * 10]
        for row in rows:
            if row["op"] == operation:
                low, high = row["quartiles_ms"]
                ratio = 1 / row["ratio_to"][OURS] if OURS in row["ratio_to"] else 1.0
                rate = f"{row['tflops']:.0f} ({row['dense_tflops']:.0f})" if "tflops" in row else ""
                lines.append(
                    f"| {case_name(row)} | {row['impl']} | {row['ms']:.4f} | {low:.4f} to {high:.4f} | {row['gbps']:.0f} | "
                    f"{row['percent_of_copy']:.1f} | {rate} | {ratio:.3f} | {row['launch_us']:.0f} | {row['transient_mb']:.1f} |"
                )
        lines.append("")
    return "\n".join(lines)


def case_name(row: dict) -> str:
    return f"{row['shape']} {row['mode']} {row['dtype']}"


def plot_ratios(rows: list[dict], path: Path) -> None:
    ours = [row for row in rows if row["impl"] == OURS]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.42 * len(ours)), layout="constrained")
    shown = {name: color for name, color in BASELINES.items() if any(name in row["ratio_to"] for row in ours)}
    height = 0.8 / max(len(shown), 1)
    for number, (baseline, color) in enumerate(shown.items()):
        at = [i + (number - (len(shown) - 1) / 2) * height for i, row in enumerate(ours) if baseline in row["ratio_to"]]
        values = [row["ratio_to"][baseline] for row in ours if baseline in row["ratio_to"]]
        bars = axis.barh(at, values, height, color=color, label=f"time relative to {baseline}")
        axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=2)
    widest = max(
        [
            1.2,
            *(
                1.08 * row["ratio_to"][baseline]
                for row in ours
                for baseline in BASELINES
                if baseline in row["ratio_to"]
            ),
        ]
    )
    axis.axvline(1.0, color="#555", linewidth=1)
    axis.set_yticks(range(len(ours)), [f"{row['op']} {row['shape']} {row['mode']}" for row in ours], fontsize=8)
    axis.set_ylim(len(ours) - 0.5, -0.5)
    axis.set(title="Fused kernels: time relative to each baseline (shorter is faster, 1 is equal)", xlim=(0, widest))
    figure.legend(fontsize=8, loc="outside lower center", ncols=max(len(shown), 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_roofline(rows: list[dict], peak_tflops: float, path: Path) -> None:
    ours = [row for row in rows if row["impl"] == OURS and "flops" in row]
    bandwidth = max(row["copy_gbps"] for row in rows)
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = [0.1, peak_tflops * 1e3 / bandwidth, 1e4]
    axis.loglog(intensities, [min(i * bandwidth / 1e3, peak_tflops) for i in intensities], color="#333")
    axis.annotate(f"copy {bandwidth:.0f} GB/s", (0.12, 0.2 * bandwidth / 1e3), rotation=38, fontsize=8)
    axis.annotate(f"bf16 product {peak_tflops:.0f} TFLOP/s", (1e3, peak_tflops * 1.1), fontsize=8)
    for operation in dict.fromkeys(row["op"] for row in ours):
        points = [row for row in ours if row["op"] == operation]
        x = [row["flops"] / row["bytes"] for row in points]
        y = [i * row["gbps"] / 1e3 for i, row in zip(x, points, strict=True)]
        best, of = max(row["percent_of_copy"] for row in points), "copy"
        if max(x) > peak_tflops * 1e3 / bandwidth:
            best, of = max(100 * row["tflops"] / peak_tflops for row in points), "product"
        axis.scatter(x, y, s=22, label=f"{operation}: {best:.0f} % of the {of} at best")
    axis.set(title="Roofline", xlabel="operations per byte", ylabel="TFLOP/s", xlim=(0.1, 1e4))
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)
