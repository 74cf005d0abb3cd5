"""Training takes the gate's choice, says so, and refuses one that was made for something else."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

import nanochat.tools.kernels as tools
from nanochat.checkpoint import load_model
from nanochat.cli import COMMANDS, parse
from nanochat.gate import choose_implementations, described, run_shape, take_gate
from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.speedrun.preflight import most_rows
from nanochat.train.memory import rows_that_fit
from nanochat_kernels import configs, gate, library
from nanochat_kernels.dispatch import operations
from tests.conftest import TINY_BASE, assert_fails_with, nanochat
from tests.nanochat.models import CARDS, on_card

SIZES = "--device cpu --preset cpu --run-name default --depth 1 --context-length 32 --device-batch-size 4".split()


def test_training_takes_the_gate(base):
    made = nanochat(base, "kernels", "gate", *SIZES)
    assert made.returncode == 0 and f"[1/{len(operations())}] " in made.stdout, made.stderr
    assert all(f"] {name}: " in made.stdout for name in operations())
    found = json.loads((Paths(base).run / "gate.json").read_text())
    assert found["device"] == "cpu" and found["shape"]["vocab"] == 512
    assert "CUDA tensors" in found["operations"]["rms_norm"]["faults"]["triton"]
    run = nanochat(base, "train", "base", *TINY_BASE, "--num-iterations", "2")
    assert run.returncode == 0 and "kernels: the gate of" in run.stdout, run.stderr + run.stdout
    assert "chose no fused operation; as their reference: rms_norm (reference " in run.stdout
    assert "; triton: KernelRequestError: rms_norm: impl='triton' does not support this call" in run.stdout
    other = nanochat(base, "train", "base", *TINY_BASE, "--device-batch-size", "8", "--total-batch-size", "256")
    assert_fails_with(
        other, "micro-batches of up to 4 rows, and here they have 8", "nanochat kernels gate --device-batch-size 8"
    )
    (Paths(base).run / "gate.json").write_text("{")
    assert_fails_with(nanochat(base, "train", "base", *TINY_BASE), "is not a gate file")


def test_without_a_preset_the_gate_is_of_the_run_that_has_none(cpu):
    """As training without a preset is, which takes it."""
    gate_options, training = (parse(COMMANDS[name].load_options(), name, []) for name in ("kernels gate", "train base"))
    assert gate_options.preset == training.preset == "" and training.device_batch_size == 0
    assert most_rows("", GPTConfig.from_depth(20, 65536), cpu) == 32


@pytest.mark.parametrize(("preset", "rows"), [("cpu", 32), ("tiny", 8)])
def test_one_gate_serves_every_stage_of_a_preset(preset, rows, cpu):
    assert most_rows(preset, GPTConfig.from_depth(3, 512), cpu) == rows


@pytest.mark.parametrize("preset", ["d20", "d26", "d32"])
@pytest.mark.parametrize("card", CARDS)
def test_one_gate_serves_every_stage_and_any_number_of_processes(preset, card, monkeypatch):
    """No stage takes more rows than the gate has judged."""
    model = GPTConfig.from_depth(int(preset[1:]), 65536)
    one = on_card(monkeypatch, card)
    gate_rows = most_rows(preset, model, one)
    for processes in (1, 2, 3, 6, 8, 16, 64):
        assert 1 <= rows_that_fit(model, replace(one, world_size=processes), "auto") <= gate_rows <= 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gate_is_measured_only_when_asked_for(base):
    """A login node would be busy for minutes, with choices that are of no use to the job."""
    refused = nanochat(base, "kernels", "gate", *SIZES[2:])
    assert_fails_with(refused, "there is no GPU here", "nanochat cluster submit gate", "--device cpu")
    assert not (Paths(base).run / "gate.json").exists()


def judged(triton: float | None, reference: float, fault: str = "") -> dict:
    """What the gate says of an operation; None: Triton's is wrong."""
    ms = {"reference": reference} | ({} if triton is None else {"triton": triton})
    why = ", ".join(f"{impl} {time}" for impl, time in ms.items()) + fault
    return {"impl": min(ms, key=ms.__getitem__), "why": why, "ms": ms, "faults": {"triton": fault} if fault else {}}


@pytest.mark.parametrize(
    ("adamw", "chosen", "why"),
    [
        (judged(1.0, 2.0), "triton", "triton 19.000 ms, reference 71.000 ms"),
        (judged(2.1, 2.0), "triton", "triton 20.100 ms, reference 71.000 ms"),
        (judged(53.0, 2.0), "triton", "triton 71.000 ms, reference 71.000 ms"),
        (judged(60.0, 2.0), "reference", "reference 71.000 ms, triton 78.000 ms"),
        (judged(None, 2.0, "3 × the error"), "reference", "reference 71.000 ms; adamw, triton: 3 × the error"),
    ],
)
def test_a_field_of_several_operations_takes_the_shortest_time_of_all_together(adamw, chosen, why):
    """A tie of one operation must not switch the optimizer to the plain loop over matrices."""
    fast = judged(6.0, 23.0)
    optimizer = dict.fromkeys(("newton_schulz", "nesterov_momentum", "apply_update"), fast) | {"adamw": adamw}
    found = choose_implementations(optimizer)["optimizer"]
    assert found.impl == chosen and sorted(found.why.split("; ")[1:]) == why.split("; ")[1:]
    assert set(found.why.split("; ")[0].split(", ")) == set(why.split("; ")[0].split(", "))


def test_a_field_with_an_operation_that_was_not_judged_is_left_out():
    assert choose_implementations({"rms_norm": judged(1.0, 2.0), "adamw": judged(1.0, 2.0)}).keys() == {"rms_norm"}


def test_the_log_says_what_is_not_used_and_why():
    choices = choose_implementations(
        {"rms_norm": judged(1.0, 2.0), "relu2_mlp": judged(3.0, 2.0), "attention": judged(None, 2.0, "; triton: NaN")}
    )
    text = "fused rms_norm; as their reference: attention (reference 2.0; triton: NaN), relu2_mlp (reference 2.0, triton 3.0)"
    assert described(choices) == text
    assert described({"rms_norm": choices["rms_norm"]}) == "fused rms_norm"
    assert described({}) == "no fused operation"


def test_evaluation_and_chat_do_not_use_what_the_gate_rejected(trained_base, tmp_path, cpu, capsys):
    """And take no heed of a file of another machine, as on a laptop with a run that was copied from a cluster."""
    shutil.copytree(trained_base, tmp_path / "base")
    paths = Paths(tmp_path / "base")
    model, _, _ = load_model(paths, "sft", cpu)
    assert model.config.impl == Implementations()
    valid_for = gate.identity(run_shape(model.config, 16), cpu.device, cpu.compute_dtype)
    right_by_auto = judged(None, 2.0, "too few rows") | {"ms": {"auto": 2.5, "reference": 2.0}}
    judgements = {"rms_norm": judged(None, 2.0, "NaN"), "relu2_mlp": judged(3.0, 2.0), "attention": right_by_auto}
    gate.write(paths.gate, valid_for, judgements)
    capsys.readouterr()
    assert load_model(paths, "sft", cpu)[0].config.impl == Implementations(rms_norm="reference")
    assert load_model(paths, "sft", cpu, Implementations(rms_norm="triton"))[0].config.impl.rms_norm == "triton"
    assert "gate" not in capsys.readouterr().out
    for content in (valid_for | {"device": "NVIDIA A100-SXM4-80GB"}, {}):
        gate.write(paths.gate, content, judgements)
        assert load_model(paths, "sft", cpu)[0].config.impl == Implementations()
        said = capsys.readouterr().out
        assert "kernels: chosen without the gate: " in said and "made for another device" in said, said


def test_only_what_was_left_to_auto_is_replaced(world, tmp_path, cpu):
    paths = replace(world, base=tmp_path)
    model = GPTConfig.from_depth(1, 512, 32, impl=Implementations(qkv_projection="reference"))
    assert take_gate(paths, model, 4, cpu) == (model, None)
    valid_for = gate.identity(run_shape(model, 4), cpu.device, cpu.compute_dtype)
    choices = ("rms_norm", "add_rms_norm", "qkv_projection", "relu2_mlp")
    gate.write(paths.gate, valid_for, {name: {"impl": "triton"} for name in choices})
    taken, _ = take_gate(paths, model, 4, cpu)
    fused = Implementations(rms_norm="triton", qkv_projection="reference", relu2_mlp="triton")
    assert taken.impl == fused and model.impl.rms_norm == "auto"


def test_attention_repeats_where_that_is_asked_for(world, tmp_path, monkeypatch):
    """On CUDA, whatever the gate chose: of torch's attention the backward adds in any order."""
    paths, runtime = replace(world, base=tmp_path), on_card(monkeypatch, "A100 40 GB")
    model = GPTConfig.from_depth(1, 512, 32)

    def taken(deterministic=True, **named):
        impl = take_gate(paths, replace(model, impl=Implementations(**named)), 4, runtime, deterministic)[0].impl
        return impl.self_attention, impl.attention

    assert taken(False) == ("auto", "auto") and taken() == ("triton", "triton")
    for named in ({"attention": "triton"}, {"qkv_projection": "reference"}, {"self_attention": "parts"}):
        assert taken(**named) == ("parts", "triton")
    assert taken(self_attention="triton", qkv_projection="reference") == ("triton", "triton")
    for named in ({"attention": "flash"}, {"self_attention": "reference"}):
        with pytest.raises(UserError, match="do not repeat bit for bit .* leave out --deterministic"):
            taken(**named)
    valid_for = {"device": "A100"}
    monkeypatch.setattr(gate, "identity", lambda *_: valid_for)
    chosen = {"self_attention": {"impl": "parts"}, "attention": {"impl": "flash"}, "rms_norm": {"impl": "triton"}}
    gate.write(paths.gate, valid_for, chosen)
    assert taken(False) == ("parts", "flash") and taken() == ("triton", "triton")
    gate.write(
        paths.gate, valid_for, chosen | {"attention": {"impl": "flash", "faults": {"triton": "3.1 × the error"}}}
    )
    assert taken(False) == ("parts", "flash")
    with pytest.raises(UserError, match="rejects: 3.1 × the error; leave --deterministic out"):
        taken()
    gate.write(
        paths.gate, valid_for, chosen | {"self_attention": {"impl": "parts", "faults": {"triton": "2.0 × the error"}}}
    )
    assert taken() == ("parts", "triton")
    with pytest.raises(UserError, match="rejects: 2.0 × the error"):
        taken(self_attention="triton")


def test_the_times_of_micro_steps_are_of_the_same_implementations(world, tmp_path, cpu):
    paths = replace(world, base=tmp_path)
    fused, times = (
        GPTConfig.from_depth(1, 512, 32, impl=Implementations(rms_norm="triton")),
        {"graph": 1.5, "compile": 2.0},
    )
    valid_for = gate.identity(run_shape(fused, 4), cpu.device, cpu.compute_dtype)
    assert take_gate(paths, fused, 4, cpu)[1] is None
    gate.write(paths.gate, valid_for, {})
    assert take_gate(paths, fused, 4, cpu)[1] is None
    gate.write(paths.gate, valid_for, {}, micro_step={"impl": asdict(fused.impl), "ms": times})
    assert take_gate(paths, fused, 4, cpu)[1] == times
    assert take_gate(paths, replace(fused, impl=Implementations()), 4, cpu)[1] is None
    gate.write(paths.gate, valid_for, {}, micro_step=None)
    with pytest.raises(UserError, match="is not a gate file .*nanochat kernels gate"):
        take_gate(paths, fused, 4, cpu)


def test_training_and_chat_launch_with_the_parameters_that_the_gate_found(
    trained_base, tmp_path, cpu, monkeypatch, capsys
):
    """But for the library, whose code has others; and only while the file is valid."""
    shutil.copytree(trained_base, tmp_path / "base")
    paths, found = Paths(tmp_path / "base"), {"ROWS": 3, "num_warps": 1}
    model = load_model(paths, "sft", cpu)[0].config
    valid_for = gate.identity(run_shape(model, 4), cpu.device, cpu.compute_dtype)
    takers = partial(take_gate, paths, model, 4, cpu), partial(load_model, paths, "sft", cpu)

    def launched() -> dict:
        return configs.launch_parameters("rms_norm_forward", cpu.device, torch.float32, (64,))

    def tuned(parameters: dict) -> dict:
        return {"sm80": {"rms_norm_forward": {"float32": {"64": parameters}}}}

    before = launched()
    for take in takers:
        gate.write(paths.gate, valid_for, {}, tuned=tuned(found))
        take()
        assert launched() == found != before
        with monkeypatch.context() as patch:
            patch.setattr(library, "in_use", lambda: True)
            take()
            assert launched() == before and "the library has its own launch parameters" in capsys.readouterr().out
        take()
        assert launched() == found
        gate.write(paths.gate, valid_for, {}, tuned=tuned({"ROWS": "many"}))
        with pytest.raises(UserError, match="is not a gate file .*ROWS.* wanted an integer.*nanochat kernels gate"):
            take()
        paths.gate.unlink()
        take()
        assert launched() == before


def test_a_micro_step_decides_between_a_graph_of_fused_operations_and_a_compiled_model(monkeypatch, cpu):
    """An operation that is no faster than its compiled reference is fused all the same where the graph is the faster whole."""
    seen = {}

    def choose(graph_ms: float) -> tuple[dict, dict]:
        choices = {
            "rms_norm": judged(1.0, 2.0),
            "output_projection": judged(1.1, 1.0),
            "qkv_projection": judged(None, 1.0, "NaN"),
            "adamw": judged(2.0, 1.0),  # no part of a micro-step
        }
        times = {"graph": graph_ms, "compile": 2.0}
        monkeypatch.setattr(tools, "time_executions", lambda configs, *_: seen.update(configs) or times)
        model = GPTConfig.from_depth(1, 512, 32)
        found = tools.choose_by_micro_step(choices, model, 4, cpu)
        assert found["ms"] == times
        return {name: choice["impl"] for name, choice in choices.items()}, found["impl"]

    taken, impl = choose(1.5)
    others = {"qkv_projection": "reference", "adamw": "reference"}
    assert taken == {"rms_norm": "triton", "output_projection": "triton", **others}
    assert impl["output_projection"] == "triton" and impl["qkv_projection"] == "reference"
    assert seen["graph"].impl.output_projection == "triton" and seen["compile"].impl.output_projection == "reference"
    taken, impl = choose(2.5)
    assert taken == {"rms_norm": "triton", "output_projection": "reference", **others}
    assert impl["rms_norm"] == "triton" and impl["output_projection"] == "reference"
