"""`python -m bench scaling` with two processes on a CPU: what it measures, keeps and concludes, and how a failure ends."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import scaling
from bench.__main__ import main
from bench.ranks import Ranks
from bench.scaling import Case, batches, link_kinds, with_efficiency
from nanochat.platform.errors import UserError

OPTIONS = (
    "--device cpu --depth 1 --gpus 2 1 --rows 2 --tokens 32 --vocab-size 301 --rounds 2 --steps 1 --variants eager:reference"
).split()
CASE = Case(1, "plain", 1, 2, 32, 1, 2, 2, 301, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times a CPU")
def test_the_command(tmp_path):
    """Rows of two and of one process, with all parts of a step; a second call with the same file measures only what is new."""
    path = tmp_path / "scaling.json"
    main(["scaling", *OPTIONS, "--json", str(path)])
    found = json.loads(path.read_text())
    assert [row["gpus"] for row in found["rows"]] == [2, 1] and (found["device"], found["gpus"]) == ("cpu", 0)
    two, one = found["rows"]
    for row in found["rows"]:
        assert "note" not in row and row["against"] == 1
        for part in ("step", "late", "micro", "update"):
            assert len(row["samples"][part]) == 2 and row[f"{part}_ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(1e3 * 64 * row["gpus"] / row["step_ms"])
    assert one["efficiency"] == 1 and two["efficiency"] == pytest.approx(one["step_ms"] / two["step_ms"])
    assert two["exchange_ms"] > 10 * one["exchange_ms"]  # alone there is none
    main(
        [
            "scaling",
            *OPTIONS,
            "--json",
            str(path),
            "--variants",
            "eager:reference",
            "compiled",
            "graph:reference",
            "--gpus",
            "2",
        ]
    )
    again = json.loads(path.read_text())["rows"]
    assert again[:2] == found["rows"] and "early_ms" not in two and two["samples"]["step"] == two["samples"]["late"]
    replayed = again[3]["samples"]  # by the CPU's launch table, which is that of an A100
    assert replayed["step"] == replayed["early"] != replayed["late"]
    assert "compiled is for one process, and there are 2; name compile:reference" in again[2]["note"]
    path.write_text(json.dumps(found | {"device": "H100"}))
    with pytest.raises(UserError, match="measured with device H100, and this is cpu; give another --json"):
        main(["scaling", *OPTIONS, "--json", str(path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="times a CPU")
def test_what_there_is_no_time_for_is_left_for_another_call(tmp_path, capsys):
    path = tmp_path / "scaling.json"
    main(["scaling", *OPTIONS, "--json", str(path), "--limit", "0"])
    assert "no time is left for d1 eager:reference on 2" in capsys.readouterr().out and not path.exists()


def test_a_mistake_in_a_variant_is_found_before_anything_starts(monkeypatch):
    monkeypatch.setattr(scaling, "call", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(UserError, match="fast is no variant"):
        scaling.scaling(scaling.ScalingConfig(variants=("fused", "fast"), device="cpu"), "")


def test_efficiency_is_against_the_fewest_gpus_that_were_measured():
    def row(gpus: int, rate: float, **more) -> dict:
        return {"depth": 20, "variant": "fused", "gpus": gpus, "tokens_per_second": rate} | more

    rows = [
        row(8, 720.0), row(1, 100.0) | {"note": "out of memory"}, row(2, 200.0), row(4, 400.0), row(4, 300.0, variant="plain"),
    ]  # fmt: skip
    found = with_efficiency(rows)
    assert [(r.get("efficiency"), r.get("against")) for r in found] == [
        (0.9, 2), (None, None), (1.0, 2), (1.0, 2), (1.0, 4),
    ]  # fmt: skip
    assert with_efficiency(found) == found  # again after each row
    assert with_efficiency([*found, row(1, 125.0)])[0]["efficiency"] == pytest.approx(0.72)
    cells = [list(column.cells) for column in scaling.table(found).columns]
    assert cells[scaling.COLUMNS.index("efficiency")] == ["0.900 of 2", "", "1.000 of 2", "1.000 of 2", "1.000 of 4"]
    assert cells[scaling.COLUMNS.index("step_ms")][1] == "none"


def test_what_is_measured_at_the_same_time_has_gpus_of_its_own():
    cases = [replace(CASE, gpus=n) for n in (1, 2, 4, 8)]
    found = [[(case.gpus, first) for case, first in batch] for batch in batches(cases, 8)]
    assert found == [[(8, 0)], [(4, 0), (2, 4), (1, 6)]]
    assert [[(case, 0)] for case in cases] == list(batches(cases, 0))


def test_links_between_gpus_as_nvidia_smi_prints_them():
    text = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPIX\t0-55\nGPU1\tNV18\t X \tSYS\t0-55\nNIC0\tPIX\tSYS\t X\n"
    )
    assert link_kinds(text) == ["NV18"]


def fails_on_the_second(runtime) -> dict:
    if runtime.rank:
        raise ValueError("broken here\nmore lines")
    runtime.barrier()
    return {}


def sleeps(runtime) -> dict:
    time.sleep(60)
    return {}


def dies(runtime) -> dict:
    os._exit(3)


def test_what_the_processes_are_forks_of_has_not_touched_a_gpu():
    """CUDA does not work in a fork of a process that has used it."""
    code = """
import torch
def used(*_, **__): raise SystemExit("used a GPU")
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, used)
torch._C._cuda_getDeviceCount = used
import bench.eight
from triton.runtime.driver import driver
assert getattr(driver, "_active", None) is None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def place(runtime) -> dict:
    runtime.barrier()
    return {"rank": runtime.rank, "of": runtime.world_size, "gpu": int(os.environ["LOCAL_RANK"])}


def test_groups_of_processes_at_the_same_time_have_gpus_of_their_own():
    groups = [Ranks(place, processes=n, device="cpu", limit=60, first=first) for n, first in ((2, 0), (1, 2))]
    two, one = (group.results() for group in groups)
    assert two == [{"rank": 0, "of": 2, "gpu": 0}, {"rank": 1, "of": 2, "gpu": 1}] and one == [
        {"rank": 0, "of": 1, "gpu": 2}
    ]


@pytest.mark.parametrize(
    ("function", "processes", "limit", "note"),
    [
        (fails_on_the_second, 2, 60, "ValueError: broken here"),
        (sleeps, 1, 3, "no result after 3 s"),
        (dies, 1, 60, "process 0 ended with status 3"),
    ],
)
def test_processes_that_give_no_result(function, processes, limit, note):
    ranks = Ranks(function, processes=processes, device="cpu", limit=limit)
    started = time.monotonic()
    assert ranks.results() == [{"note": note}]
    assert time.monotonic() - started < 30 and not any(process.is_alive() for process in ranks.processes)
