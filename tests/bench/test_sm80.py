"""python -m bench.sm80: what an A100 has for each kernel, and what the kernel needs of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import sm80
from nanochat_kernels import dispatch
from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks", "limit"),
    [
        (255, 98_304, 8, 1, "shared memory, registers"),  # 255 × 32 registers in units of 256: 8 warps of 65,536
        (128, 71_936, 4, 2, "shared memory"),  # 164 KiB ÷ (71,936 + 1,024)
        (64, 0, 4, 8, "registers"),  # 32 warps
        (32, 0, 32, 2, "warps, registers"),  # 64 warps
        (16, 0, 1, 32, "blocks"),
    ],
)
def test_occupancy(registers, shared, warps, blocks, limit):
    """By hand from the limits of compute capability 8.0 in the CUDA programming guide."""
    assert sm80.occupancy(registers, shared, warps) == (blocks, limit)


def row(bytes: int, flops: float) -> sm80.Row:
    return sm80.Row("k", "f", "", "bfloat16", 32, 0, 0, 4, 1.0, "warps", 1.0, bytes, flops)


def test_the_floor_is_that_of_memory_or_of_products():
    assert row(2_039_000_000, 0.0).floor_ms == pytest.approx(1.0) and row(2_039_000_000, 1e9).bound == "memory"
    assert row(1000, 312e9).floor_ms == pytest.approx(1.0) and row(1000, 312e9).bound == "compute"


def test_what_is_expected_comes_from_the_copy_or_from_flash_attention():
    assert sm80.expected([row(10**9, 0.0)], {"ms": 2.0, "copy_ms": 1.5}) == pytest.approx(0.75)
    measured = {"ms": 1.0, "copy_ms": 0.1, "tflops": 450.0, "flash_tflops": 400.0}
    assert sm80.expected([row(1000, 1e12)], measured) == pytest.approx(180 / 312 * 450 / 400)


def test_the_table_of_the_repository_has_every_kernel():
    text = (ROOT / "bench" / "results" / "simulation" / "a100_kernels.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    found, wanted = {line.split(" | ")[0].lstrip("| ") for line in rows}, {k.name for k in dispatch.tunable_kernels()}
    assert found == wanted, (
        f"the table differs by {', '.join(sorted(found ^ wanted))}; its second paragraph has the command that writes it again"
    )


def test_the_table_of_three_kernels(tmp_path):
    command = [sys.executable, "-m", "bench.sm80", "table", "--out"]
    command += [tmp_path / "table.md", "--kernel", "rms_norm_forward", "relu2_mlp_up", "cache_append"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(None))
    assert done.returncode == 0, done.stderr
    lines = [
        line
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith(("| rms", "| relu2", "| cache"))
    ]
    cells = {line.split(" | ")[0].lstrip("| "): [cell.strip() for cell in line.split("|")] for line in lines}
    # 65,536 × 1280: two bytes are read and two written of each element, and rstd: 165 µs at 2,039 GB/s
    assert cells["rms_norm_forward"][12:16] == ["335.8", "0.0", "0.165", "memory"]
    assert cells["cache_append"][12] == "0.7", "no more of the cache than is appended"
    # 2 · 65,536 · 5,120 · 1,280 FLOPs at 312 TFLOP/s
    assert cells["relu2_mlp_up"][13:16] == ["859.0", "2.753", "compute"]


def test_bad_input_is_one_line(tmp_path):
    command = [sys.executable, "-m", "bench.sm80"]
    for arguments, words in ((["table", "--kernel", "nothing"], "--kernel must be among"), (["run"], "has none")):
        if arguments == ["run"] and sm80.torch.cuda.is_available():
            continue
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment(None))
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
