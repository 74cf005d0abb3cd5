"""The benchmark's own logic, on made-up results: comparison, report, command line, samples handed to pytest-benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import suite
from bench.compare import compare, load
from bench.report import write_report
from nanochat.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def row(impl="triton", ms=1.0, copy=4000.0, spread=0.01, **more):
    return {
        "op": "rms_norm", "shape": "d20", "mode": "fwd", "dtype": "bfloat16", "impl": impl, "ms": ms, "copy_gbps": copy,
        "quartiles_ms": [ms * (1 - spread), ms * (1 + spread)], "samples_ms": [ms] * 5, "bytes": 1, "gbps": 3000.0,
        "percent_of_copy": 75.0, "ratio_to": {}, "launch_us": 20.0, "transient_mb": 0.1, **more,
    }  # fmt: skip


def result(path: Path, *rows: dict) -> Path:
    header = {
        "command": "python -m bench",
        "commit": "abc",
        "date": "today",
        "device": "a GPU",
        "product_tflops": 700.0,
    }
    path.write_text(json.dumps({**header, "versions": {"torch": "2"}, "rows": list(rows)}))
    return path


@pytest.mark.parametrize(
    ("after", "slower"),
    [
        (row(ms=1.02), 0),  # within 3 %
        (row(ms=1.10), 1),
        (row(ms=1.10, spread=0.10), 0),  # within the noise
        (row(ms=1.10, copy=3600.0), 0),  # the whole GPU was slower
        (row(ms=0.50), 0),
    ],
)
def test_compare(tmp_path, after, slower):
    before, after = result(tmp_path / "a.json", row()), result(tmp_path / "b.json", after)
    assert compare(before, after) == slower
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compare", before, after], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == slower and ("SLOWER" in done.stdout) == bool(slower), done.stdout + done.stderr


def test_compare_refuses_what_is_no_result(tmp_path):
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(UserError, match=r"c\.json is no result of python -m bench"):
        load(tmp_path / "c.json")
    one, other = result(tmp_path / "a.json", row()), result(tmp_path / "b.json", row(shape="d12"))
    with pytest.raises(UserError, match="no case in common"):
        compare(one, other)


def test_report(tmp_path):
    rows = [
        row(ratio_to={"eager": 0.5, "compile": 0.9}),
        row("eager", 2.0, ratio_to={"triton": 2.0}),
        {**row("compile"), "ms": None, "note": "out of memory"},
    ]
    html = write_report((result(tmp_path / "a.json", *rows),), tmp_path / "out")
    text, page = (tmp_path / "out/report.md").read_text(), html.read_text()
    assert "| d20 fwd bfloat16 | eager | 2.0000 |" in text and "| 0.500 |" in text
    assert page.count("data:image/png;base64,") == 2 and "<table>" in page
    for name in ("ratios.png", "roofline.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "attention"], "--op attention is not measured here"),
        (["--shape", "d99"], "--shape must be among"),
        (["--mode", "sideways"], "--mode must be among fwd, bwd, both"),
        (["--dtype", "int8"], "--dtype must be bfloat16, float16 or float32"),
        (["report", "missing.json"], "missing.json is no result"),
    ],
)
def test_command_line_refuses(arguments, message):
    done = subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_suites_hand_over_the_samples(benchmark, monkeypatch):
    """What pytest-benchmark reports is what was measured, not how long it took to hand over."""
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "measured", lambda *key: {"triton": row(samples_ms=[1.0, 3.0, 2.0])})
    benchmark._timer = suite.clock
    suite.replay(benchmark, "rms_norm", "d20", "fwd", "triton")
    assert benchmark.stats.stats.median == pytest.approx(2e-3) and benchmark.extra_info["percent_of_copy"] == 75.0
