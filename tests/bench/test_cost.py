"""Hours and dollars of the d20 speedrun, and what measured exchanges tell the simulation."""

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.cost import ASSUMED, machine, measured_rows, narrowed, parts, run_of, simulated
from nanochat.platform.errors import UserError


def row(gpus: int, **more: object) -> dict:
    """A step of 200 ms on each of some GPUs, 180 of them in the micro-step of 16 rows; of an exchange of 10 ms, 8 are hidden."""
    samples = {"step": [198.0, 200.0, 202.0], "late": [206.0, 208.0, 210.0]}
    return {
        "depth": 20, "variant": "fused", "gpus": gpus, "rows": 16, "tokens": 2048, "micro_steps": 1, "vocab_size": 65536,
        "step_ms": 200.0, "micro_ms": 180.0, "exchange_ms": 10.0, "update_ms": 8.0, "samples": samples, "device": "H100",
    } | more  # fmt: skip


def test_a_step_of_pretraining_has_as_many_micro_steps_as_its_tokens_need():
    """524,288 tokens are two micro-steps of 16 rows of 2,048 on eight GPUs, and sixteen on one."""
    assert machine(row(8), 24.0).step == pytest.approx([0.378, 0.380, 0.382])
    assert machine(row(8), 24.0).micro == pytest.approx([0.36] * 3)
    assert machine(row(8, rows=32), 24.0).step[1] == pytest.approx(0.2)
    assert machine(row(1), 24.0).step[1] == pytest.approx(0.2 + 15 * 0.18)
    with pytest.raises(UserError, match="524,288 tokens are no multiple of what scaling measured on 6 GPUs"):
        machine(row(6), 24.0)


def test_the_parts_of_the_speedrun():
    found = {part: seconds for part, seconds, _ in parts(machine(row(8), 24.0))}
    assert found["base: steps"][1] == pytest.approx(21_400 * 0.38)
    # before the first step, every 250 of 21,400, and at the end: 87 times 20 · 524,288 tokens, forward only
    assert found["base: bits per byte"][0] == pytest.approx(87 * 20 * 0.36 * ASSUMED["forward"].low)
    assert found["base: saves"][2] == pytest.approx(86 * (8 * 393_216_000 + 12 * 167_772_160) / 0.5e9)
    assert all(low <= middle <= high and low > 0 for low, middle, high in found.values())
    assert found["sft: steps"][1] < found["mid: steps"][1] < found["base: steps"][1]


def test_hours_and_dollars_of_a_run():
    run = run_of(machine(row(8), 24.0))
    assert run["hours"] == pytest.approx(np.sum([part["hours"] for part in run["parts"]], axis=0))
    assert run["dollars"] == pytest.approx([24 * hours for hours in run["hours"]]) and 2.3 < run["hours"][1] < 3.5
    assert run_of(machine(row(8), 0.0))["dollars"] is None and all(part["from"] for part in run["parts"])


def test_a_simulated_machine_has_the_share_of_its_micro_steps():
    parts_ms = {"products": 600, "attention": 100, "other passes": 100, "update": 100, "exchange": 50, "waiting": 50}
    found = simulated({"gpus": 8, "card": "A100 80 GB", "step_ms": [900, 1000, 1100], "parts_ms": parts_ms}, 14.0)
    assert found.step == pytest.approx([0.9, 1.0, 1.1]) and found.micro == pytest.approx(0.8 * found.step)


def test_measured_exchanges_narrow_the_inputs_of_the_simulation():
    found = narrowed([row(1, exchange_ms=0.0, update_ms=4.0), row(8)])
    assert (found["open_reduce"].low, found["open_reduce"].high) == pytest.approx((0.2, 0.2))
    gather = 10 * (2 * 560_988_160 + 2 * 167_772_160) / (4 * 560_988_160)  # ms, as fast as the exchange
    assert found["open_gather"].low == pytest.approx((8 - 4) / gather)
    assert found["open_gather"].high == pytest.approx(min(1, (8 - 0.5) / gather))
    assert narrowed([row(1)]) == narrowed([row(4), row(8)]) == {}
    late = {"step": [206.0, 208.0], "late": [206.0, 208.0]}  # as on Hopper
    assert narrowed([row(1, exchange_ms=0.0), row(8, samples=late)]).keys() == {"open_gather"}


def test_the_command_with_a_measured_file(tmp_path, capsys):
    path, out = tmp_path / "scaling.json", tmp_path / "simulation.json"
    rows = [row(8), row(1, exchange_ms=0.0), row(8, variant="compile:reference"), row(8) | {"note": "out of memory"}]
    path.write_text(json.dumps({"device": "H100", "rows": rows}))
    assert [one["gpus"] for one in measured_rows(path)] == [1, 8]
    prices = "--price-per-hour 24 --a100-price-per-hour 14".split()
    main(["simulate", "--measured", str(path), *prices, "--json", str(out)])
    found = json.loads(out.read_text())
    assert [run["machine"] for run in found["runs"]] == [
        "8 × H100", "8 × A100 80 GB, simulated", "8 × A100 40 GB, simulated",
    ]  # fmt: skip
    assert found["inputs"]["open_reduce"]["why"].startswith("as measured on 8 × H100")
    assert found["runs"][1]["dollars"][1] == pytest.approx(14 * found["runs"][1]["hours"][1])
    assert "dollars" in capsys.readouterr().out
    path.write_text(json.dumps({"device": "H100", "rows": [row(8, depth=26)]}))
    with pytest.raises(UserError, match="has no row of d20, fused"):
        measured_rows(path)
