"""nanochat kernels tune: what is searched and how the table is written."""

import json
from types import SimpleNamespace

import pytest
import torch

from nanochat_kernels import configs, product_configurations, tune
from nanochat_kernels.operation import Kernel
from tests.conftest import nanochat
from tests.kernels.harness import GPU


def test_tuning_writes_a_table_that_reads_back(tmp_path, monkeypatch):
    before = configs.table("sm90")
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    tune.write("sm90", before)
    try:
        assert configs.table("sm90") == before and json.loads((tmp_path / "sm90.json").read_text()) == before
        assert [path.name for path in tmp_path.iterdir()] == ["sm90.json"]
    finally:
        monkeypatch.undo()
        configs.clear()


def test_a_write_that_fails_leaves_the_old_table_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    (tmp_path / "sm90.json").write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        tune.write("sm90", {"launch": {}})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(GPU, reason="there is a GPU to tune on")
def test_tuning_needs_a_gpu(base):
    done = nanochat(base, "kernels", "tune")
    assert done.returncode == 1 and "measured on a GPU, and this machine has none" in done.stderr


def test_the_search_for_code_that_is_run_as_ptx_leaves_torch_out(monkeypatch):
    """torch's product would run as the device's own code, and win against sm80's on an H100."""
    by_torch = product_configurations.BY_TORCH
    assert tune.is_for(by_torch, "sm80") and tune.is_for(by_torch, "sm90")
    monkeypatch.setattr(tune, "forced_architecture", lambda: "sm80")
    assert not tune.is_for(by_torch, "sm80")


def test_a_table_names_the_gpu_of_every_kernel():
    table = {"measured_on": "H200", "launch": {"a": {}, "b": {}}}
    tune.note_card(table, "a", "H200")
    assert table == {"measured_on": "H200", "launch": {"a": {}, "b": {}}}
    tune.note_card(table, "a", "H100")
    assert table["measured_on"] == "H200" and table["measured_elsewhere"] == {"a": "H100"}
    tune.note_card(table, "b", "H100")
    assert table == {"measured_on": "H100", "launch": {"a": {}, "b": {}}}


SOME_KEY = (1280,)


@pytest.fixture
def stand_ins(monkeypatch):
    """A kernel of four configurations: their times, and by set of flags the configurations that have a defect there."""
    times, defects = {1: 3.0, 2: 1.0, 4: 2.0, 8: 4.0}, {"first": set(), "second": set()}
    kernel = Kernel("some", (torch.bfloat16,), (SOME_KEY,), tuple({"ROWS": rows} for rows in times), lambda *_: {})

    def interleaved(variants, rounds):
        return {name: [times[run(0)["ROWS"]]] * rounds for name, run in variants.items()}

    def inspect_launch(rows, target, place):
        return SimpleNamespace(defects=("8 bytes spilled",) if rows in defects[place.flags] else ())

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "timed", lambda *_: lambda parameters: parameters)
    monkeypatch.setattr(tune.timing, "interleaved", interleaved)
    monkeypatch.setattr(tune.inspect, "record", lambda kernel, key, dtype, p: {flags: [p["ROWS"]] for flags in defects})
    monkeypatch.setattr(tune.inspect, "inspect_launch", inspect_launch)
    return kernel, defects


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [(set(), set(), 2), ({2}, set(), 4), (set(), {2}, 4), ({4}, {2}, 1), (set(), {2, 4, 1}, 8)],
)
def test_the_fastest_without_a_defect_in_any_set_of_flags_is_taken(stand_ins, first, second, taken):
    kernel, defects = stand_ins
    defects["first"] |= first
    defects["second"] |= second
    said = []
    ms, parameters = tune.fastest(kernel, SOME_KEY, torch.bfloat16, "sm80", list(kernel.space), said.append)
    assert parameters == {"ROWS": taken} and ms == {1: 3.0, 2: 1.0, 4: 2.0, 8: 4.0}[taken]
    assert ("second: 8 bytes spilled" in "".join(said)) == bool(second)


def test_only_defects_is_no_choice(stand_ins):
    kernel, defects = stand_ins
    defects["second"] |= {1, 2, 4, 8}
    with pytest.raises(tune.inspect.CannotRun, match="some: no configuration for 1280 .* compiles without a defect"):
        tune.fastest(kernel, SOME_KEY, torch.bfloat16, "sm80", list(kernel.space), print)
