"""`nanochat kernels inspect` and `tune`: one line for what a user can change, a traceback for a bug. `gate` tunes first."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import nanochat.tools.kernels as tools
from nanochat.gpt import GPTConfig
from nanochat.options.tools import KernelsGateOptions, KernelsInspectOptions, KernelsTuneOptions
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.tools.kernels import inspect_kernels, tune_kernels
from nanochat_kernels import configs, dispatch, gate, inspect, library, tune, tune_run

COMMANDS = [
    (inspect_kernels, KernelsInspectOptions, inspect, "inspect_all"),
    (tune_kernels, KernelsTuneOptions, tune, "tune"),
]


def raising(error: Exception):
    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize(("command", "options", "module", "name"), COMMANDS)
@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (inspect.CannotRun("no GPU"), UserError),
        (configs.LaunchTableError("no table"), UserError),
        (RuntimeError("a bug"), RuntimeError),
        (ValueError("a bug"), ValueError),
    ],
)
def test_only_errors_raised_for_a_user_become_one_line(monkeypatch, command, options, module, name, error, shown):
    monkeypatch.setattr(module, name, raising(error))
    with pytest.raises(shown, match=str(error)) as raised:
        command(options())
    assert raised.type is shown


@pytest.mark.parametrize(("command", "options", "module", "name"), COMMANDS)
def test_a_kernel_that_does_not_exist_is_a_users_error(command, options, module, name):
    with pytest.raises(UserError, match="no kernel is called no_kernel; there are"):
        command(options(kernel=("no_kernel",)))


TUNED = {"rms_norm_forward": {"bfloat16": {"128": {"ROWS": 3, "num_warps": 1}}}}
ON_GPU = Runtime(0, 1, torch.device("cuda", 0), torch.bfloat16)
MODEL = GPTConfig.from_depth(2, 512, 64)
WRONG_AND_RIGHT = (("reference", {"triton": "3 × the error"}), ("triton", {}))


@pytest.fixture
def searched(monkeypatch):
    """What the search was called with; it finds TUNED and leaves one kernel."""
    calls = []

    def search(works, seconds, say):
        calls.append((works, seconds))
        return tune_run.Found("sm80", TUNED, ["finish_rows float32 20: the 240 s were over"])

    monkeypatch.setattr(tune_run, "search", search)
    yield calls
    configs.take_parameters({})


def test_the_kernels_of_a_training_step_are_tuned_and_those_of_every_implementation(searched, capsys):
    assert tools.tune_for_run(MODEL, 4, ON_GPU) == {"sm80": TUNED}
    [(works, seconds)] = searched
    assert seconds <= 300 and works[0].args == (MODEL,) and works[0].keywords == {
        "dtype": torch.bfloat16, "rows": 4, "length": 64,
    }  # fmt: skip
    chosen = [{name: impl for name, impl in vars(work.args[0].impl).items() if impl != "auto"} for work in works[1:]]
    assert {"self_attention": "triton"} in chosen and {"linear_cross_entropy": "fused"} in chosen
    assert all(len(impl) == 1 and work.args[0].depth == 1 for impl, work in zip(chosen, works[1:], strict=True))
    names = {case.name for case in tune_run.cases_of(works, "sm80", set(configs.table("sm80")["launch"]))}
    assert {"relu2_mlp_up", "attention_key_gradients", "cross_entropy_exponentials", "finish_rows"} <= names
    said = capsys.readouterr().out
    assert (
        "not tuned: finish_rows float32 20: the 240 s were over" in said
        and "1 searched, 1 left as in the launch table" in said
    )
    assert "128" in configs.table("sm80")["launch"]["rms_norm_forward"]["bfloat16"]


def test_with_the_library_nothing_is_tuned(searched, monkeypatch, capsys):
    monkeypatch.setattr(library, "in_use", lambda: True)
    assert tools.tune_for_run(MODEL, 4, ON_GPU) == {} and not searched
    assert "those of the library" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [True, False])
def test_the_gate_tunes_before_it_judges_and_keeps_what_it_found(searched, monkeypatch, world, tmp_path, asked):
    paths, seen = replace(world, base=tmp_path), []

    def examine(*_):
        seen.append("128" in configs.table("sm80")["launch"]["rms_norm_forward"]["bfloat16"])
        yield "rms_norm", {"impl": "triton", "why": "", "ms": {}, "faults": {}}

    configs.take_parameters({"sm80": {"rms_norm_forward": {"bfloat16": {"128": {"ROWS": 9, "num_warps": 1}}}}})
    monkeypatch.setattr(tools, "start_runtime", lambda device: nullcontext(ON_GPU))
    monkeypatch.setattr(gate, "examine", examine)
    monkeypatch.setattr(gate, "identity", lambda *_: {})
    monkeypatch.setattr(tools, "choose_by_micro_step", lambda *_: {"impl": {}, "ms": {"graph": 1.0}})
    tools.run_gate(KernelsGateOptions(depth=1, context_length=32, device_batch_size=4, tune=asked), paths)
    assert seen == [asked] and len(searched) == asked
    assert json.loads(paths.gate.read_text()).get("tuned") == ({"sm80": TUNED} if asked else None)
    assert set(json.loads(paths.gate.read_text())["operations"]) <= set(dispatch.operations())


@pytest.mark.parametrize("right_with_the_table", [True, False])
def test_kernels_that_are_wrong_with_searched_parameters_get_those_of_the_table(monkeypatch, right_with_the_table):
    wrong, right = ({"impl": impl, "why": "", "ms": {}, "faults": faults} for impl, faults in WRONG_AND_RIGHT)
    other = {"relu2_mlp_up": {"bfloat16": {"1": {"ROWS": 1}}}}
    tuned = {"sm80": TUNED | other}
    before = configs.table("sm80")["launch"]["rms_norm_forward"]["bfloat16"]
    seen = []

    def examine_operation(operation, *_):
        seen.append((operation.name, configs.table("sm80")["launch"]["rms_norm_forward"]["bfloat16"] == before))
        return right if right_with_the_table else wrong

    monkeypatch.setattr(gate, "examine", lambda *_: iter([("rms_norm", wrong), ("adamw", right)]))
    monkeypatch.setattr(gate, "examine_operation", examine_operation)
    configs.take_parameters(tuned)
    try:
        found = dict(tools.examined(None, ON_GPU, tuned))
        assert seen == [("rms_norm", True)] and found["adamw"] == right
        assert found["rms_norm"] == (right if right_with_the_table else wrong)
        assert tuned == {"sm80": other if right_with_the_table else TUNED | other}
        taken = configs.table("sm80")["launch"]["rms_norm_forward"]["bfloat16"]
        assert (taken == before) == right_with_the_table
    finally:
        configs.take_parameters({})


def test_a_search_that_fails_names_the_way_without_it(searched, monkeypatch, world, tmp_path):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(tools, "start_runtime", lambda device: nullcontext(ON_GPU))
    monkeypatch.setattr(tools, "tune_for_run", fails)
    options = KernelsGateOptions(depth=1, context_length=32, device_batch_size=4)
    with pytest.raises(UserError, match=r"illegal memory access was encountered\); without it: --no-tune"):
        tools.run_gate(options, replace(world, base=tmp_path))
