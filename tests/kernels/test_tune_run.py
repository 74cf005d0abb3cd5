"""What a run launches is searched where the launch table is of another GPU model: the dearest first, until the time is up."""

import re
from functools import partial

import pytest
import torch

import nanochat_kernels as kernels
from nanochat_kernels import configs, tune, tune_run
from nanochat_kernels.tune_run import Case
from tests.kernels.harness import GPU, check

A100 = "NVIDIA A100-SXM4-80GB"
KEY, DTYPE = (65_536, 5120, 1280), torch.bfloat16
UP, NORM = Case("relu2_mlp_up", DTYPE, KEY), Case("rms_norm_forward", DTYPE, (1280,))


@pytest.fixture(autouse=True)
def as_committed():
    yield
    configs.take_parameters({})


def step(norms: int = 3, mlps: int = 1, impl: str = "triton") -> None:
    """On the meta device: RMSNorm and the MLP of d20."""
    x = torch.empty(*(32, 2048, 1280), dtype=DTYPE, device="meta")
    for _ in range(norms):
        kernels.rms_norm(x, impl=impl)
    up, down = (torch.empty(shape, dtype=DTYPE, device="meta") for shape in ((5120, 1280), (1280, 5120)))
    for _ in range(mlps):
        kernels.relu2_mlp(x, up, down, impl=impl)


class Clock:
    """Stands for the GPU: each configuration has a time, and a search takes some seconds."""

    def __init__(self, monkeypatch, ms: dict[str, float], seconds: float = 1.0):
        self.ms, self.now, self.seconds, self.compiled, self.searched = ms, 0.0, seconds, [], []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(tune_run, "architecture", lambda index: "sm80")
        monkeypatch.setattr(tune, "card_here", lambda architecture: A100)
        monkeypatch.setattr(tune, "timed", self.timed)
        monkeypatch.setattr(tune, "fastest", self.fastest)
        monkeypatch.setattr(tune_run.timing, "interleaved", self.interleaved)
        monkeypatch.setattr(
            tune_run.ahead, "compile_side_by_side", lambda launches, device: self.compiled.append(len(list(launches)))
        )

    def timed(self, kernel, key, dtype, device):
        def run(parameters) -> float:
            if parameters.get("num_warps") == 16:
                raise RuntimeError("out of resource: shared memory")
            committed = configs.parameters_in("sm80", kernel.name, dtype, key)
            # the more warps and groups the faster, but for the committed parameters
            return self.ms.get(kernel.name, 0.01) / (
                1 if parameters == committed else 1 + len(str(parameters)) + parameters["num_warps"]
            )

        return run

    def interleaved(self, variants, rounds):
        return {name: [run(0)] * rounds for name, run in variants.items()}

    def fastest(self, kernel, key, dtype, name, candidates, say):
        self.now += self.seconds
        self.searched.append((kernel.name, candidates))
        run = self.timed(kernel, key, dtype, None)
        return min(((run(parameters), parameters) for parameters in candidates), key=lambda found: found[0])

    def search(self, *works, seconds: float = 10.0, say=lambda line: None):
        return tune_run.search(works, seconds, say, clock=lambda: self.now)


def test_only_what_the_run_launches_and_another_card_measured_is_searched(monkeypatch):
    assert tune_run.cases_of([step], "sm80", {"relu2_mlp_up", "attention_forward"}) == {UP: 1}
    table = configs.table("sm80") | {"measured_on": A100}
    monkeypatch.setattr(configs, "table", lambda name: table)
    table["measured_elsewhere"] = {"relu2_mlp_up": "NVIDIA H200", "attention_forward": "NVIDIA H200"}
    assert tune_run.measured_elsewhere("sm80", A100) == {"relu2_mlp_up", "attention_forward"}
    assert "relu2_mlp_up" not in tune_run.measured_elsewhere("sm80", "NVIDIA H200")
    del table["measured_elsewhere"]
    assert tune_run.measured_elsewhere("sm80", A100) == set()


def test_the_committed_tables_are_of_no_a100():
    assert tune_run.measured_elsewhere("sm80", A100) == configs.table("sm80")["launch"].keys()
    assert not tune_run.measured_elsewhere("sm90", "NVIDIA H200")


def test_of_several_works_the_first_counts_and_those_that_cannot_run_are_left_out():
    works = step, partial(step, mlps=2), partial(step, impl="nonsense")
    found = tune_run.cases_of(works, "sm80", set(configs.table("sm80")["launch"]))
    assert found[UP] == 1 and found[Case("relu2_mlp_down", DTYPE, (65_536, 1280, 5120))] == 1
    assert {case.name for case in tune_run.cases_of(works, "sm80", {"relu2_mlp_up"})} == {"relu2_mlp_up"}


def test_the_dearest_is_searched_first_and_what_there_is_no_time_for_is_named(monkeypatch):
    """By time and number of launches."""
    ms = {"rms_norm_forward": 4.0, "relu2_mlp_up": 2.0, "relu2_mlp_down": 3.0}
    clock = Clock(monkeypatch, ms)
    found = clock.search(partial(step, mlps=3), seconds=2.0)
    assert [name for name, _ in clock.searched] == ["relu2_mlp_down", "relu2_mlp_up"]
    assert found.launch.keys() == {"relu2_mlp_down", "relu2_mlp_up"} and found.architecture == "sm80"
    assert f"{NORM}: the 2 s were over" in found.left
    clock = Clock(monkeypatch, ms)
    assert clock.search(partial(step, mlps=1)).left == []
    assert [name for name, _ in clock.searched][:3] == ["rms_norm_forward", "relu2_mlp_down", "relu2_mlp_up"]


def test_a_few_configurations_are_timed_again_and_the_committed_one_takes_part(monkeypatch):
    clock, said = Clock(monkeypatch, {"rms_norm_forward": 1.0}), []
    found = clock.search(partial(step, mlps=0), say=said.append)
    [(_, finalists)] = clock.searched
    space = NORM.kernel.space
    committed = configs.parameters_in("sm80", *NORM)
    able = [p for p in (committed, *(p for p in space if p != committed)) if p["num_warps"] != 16]
    assert 4 < len(able) < len(space) and len(finalists) == 4 and all(p in able for p in finalists)
    chosen = found.launch["rms_norm_forward"]["bfloat16"]["1280"]
    assert chosen in finalists and chosen != committed and "1.0000 with those of the launch table" in said[0]
    # the committed one, then all, then the finalists in every set of flags
    flags = len(NORM.kernel.launches(NORM.key, DTYPE, torch.device("meta")))
    assert clock.compiled == [1, len(space) + (committed not in space), 4 * flags]


def test_where_the_table_was_measured_on_this_card_nothing_is_recorded(monkeypatch):
    Clock(monkeypatch, {})
    monkeypatch.setattr(tune_run, "measured_elsewhere", lambda *_: set())
    assert tune_run.search([lambda: 1 / 0], 1.0, print) == ("sm80", {}, [])


def test_what_fails_is_left_and_the_others_are_searched(monkeypatch):
    clock = Clock(monkeypatch, {"relu2_mlp_up": 5.0})

    def fastest(kernel, *others):
        if kernel.name == "relu2_mlp_up":
            raise RuntimeError("an illegal instruction\nwas encountered")
        return clock.fastest(kernel, *others)

    monkeypatch.setattr(tune, "fastest", fastest)
    monkeypatch.setattr(tune_run.ahead, "compile_side_by_side", lambda launches, device: 1 / 0)
    found = clock.search(step)
    assert found.left == [f"{UP}: RuntimeError: an illegal instruction"] and "relu2_mlp_down" in found.launch


def test_a_kernel_whose_inputs_do_not_fit_is_left(monkeypatch):
    clock = Clock(monkeypatch, {"rms_norm_forward": 1.0})

    def timed(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nTried")

    monkeypatch.setattr(tune, "timed", timed)
    assert clock.search(partial(step, mlps=0)) == (
        "sm80",
        {},
        ["rms_norm_forward bfloat16 1280: OutOfMemoryError: CUDA out of memory"],
    )


def test_taken_parameters_are_those_of_the_calls():
    """Of this key and of what is nearer to it than to the committed classes; of one architecture; until they are taken back."""
    cpu, mine = torch.device("cpu"), {"ROWS": 7, "num_warps": 1}
    before = configs.launch_parameters("rms_norm_forward", cpu, DTYPE, (1280,))
    shape_of_run = configs.launch_parameters("rms_norm_forward", cpu, DTYPE, (1664,))
    configs.take_parameters({"sm80": {"rms_norm_forward": {"bfloat16": {"1664": mine}}}})
    with configs.tables_of("sm80"):
        assert configs.launch_parameters("rms_norm_forward", cpu, DTYPE, (1664,)) == mine
        assert configs.launch_parameters("rms_norm_forward", cpu, DTYPE, (1280,)) == before
        assert configs.launch_parameters("rms_norm_forward", cpu, torch.float16, (1664,)) != mine
    with configs.tables_of("sm90"):
        assert configs.launch_parameters("rms_norm_forward", cpu, DTYPE, (1664,)) != mine
    configs.take_parameters({})
    assert configs.launch_parameters("rms_norm_forward", cpu, DTYPE, (1664,)) == shape_of_run
    assert "1664" not in configs.table("sm80")["launch"]["rms_norm_forward"]["bfloat16"]


@pytest.mark.skipif(not GPU, reason="launch parameters are measured on a GPU")
def test_a_search_on_a_gpu_finds_parameters_that_compute_the_same(monkeypatch):
    """With the real compiler and clock, of two kernels; nothing is left, and nothing is slower than what was committed."""
    names, said = {"rms_norm_forward", "relu2_mlp_up"}, []
    monkeypatch.setattr(tune_run, "measured_elsewhere", lambda *_: names)
    found = tune_run.search([step], 120.0, said.append)
    assert found.left == [] and found.launch.keys() == names, found.left
    for line in said:
        ms, committed = map(
            float, re.search(r": ([\d.]+) ms .*, ([\d.]+) with those of the launch table", line).groups()
        )
        assert 0 < ms < 1.2 * committed, line
    configs.take_parameters({found.architecture: found.launch})
    x = torch.randn(64, 1280, dtype=DTYPE, device="cuda")
    weights = (0.03 * torch.randn(shape, dtype=DTYPE, device="cuda") for shape in ((5120, 1280), (1280, 5120)))
    for operation, inputs in ((kernels.rms_norm, (x,)), (kernels.relu2_mlp, (x, *weights))):
        check(*(partial(operation, impl=impl) for impl in ("triton", "reference")), inputs)
