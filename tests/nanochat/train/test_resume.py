"""Training that is killed, stopped, broken or repeated resumes as if nothing had happened."""

import json
import random
import shutil
import subprocess
import time
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.cli import main
from nanochat.gpt import GPT
from nanochat.options.train import TrainBaseOptions
from nanochat.platform.errors import UserError
from nanochat.platform.files import sha256_of
from nanochat.platform.paths import Paths
from nanochat.train.pretrain import pretrain
from tests import forked
from tests.conftest import TINY_BASE, TINY_MID, TINY_SFT, assert_fails_with, command, environment, nanochat


def losses(base, stage: str = "base") -> dict[int, float]:
    lines = (Paths(base).run / "metrics" / f"{stage}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == sorted(set(steps)), "a step was logged twice"
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records if "loss" in r}


def evaluations(base) -> dict[int, float]:
    lines = (Paths(base).run / "metrics" / "base.jsonl").read_text().splitlines()
    return {r["step"]: r["val_bpb"] for r in map(json.loads, lines) if "val_bpb" in r}


def weights(base, stage: str = "base") -> bytes:
    newest = sorted((Paths(base).run / "checkpoints" / stage).glob("step_*"))[-1]
    return (newest / "model.safetensors").read_bytes()


def copy(base, name: str):
    target = base.with_name(name)
    shutil.copytree(base, target)
    return target


def start(base, *arguments: str) -> forked.Forked | subprocess.Popen:
    return forked.start(*command(*arguments)[1:], env=environment(base))


def wait_for(condition, process: forked.Forked | subprocess.Popen, limit: float = 120) -> bool:
    """True when the condition came, False when the process ended first."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    raise AssertionError("nothing happened in time")


def test_a_run_killed_at_random_instants_and_inside_saves_ends_the_same(base):
    arguments = ["train", "base", *TINY_BASE, "--num-iterations", "60"]
    whole = copy(base, "whole")
    assert nanochat(whole, *arguments).returncode == 0
    rng, saving, metrics = random.Random(0), 0, Paths(base).run / "metrics" / "base.jsonl"
    directory = Paths(base).run / "checkpoints" / "base"
    for attempt in range(12):
        process = start(base, *arguments)
        if attempt % 2:  # inside a save: while the temporary directory exists
            reached = wait_for(lambda: any(directory.glob(".step_*")), process)
        else:  # some steps later than wherever it resumed
            lines = metrics.read_text().count("\n") if metrics.exists() else 0
            goal = lines + rng.randint(1, 8)
            reached = wait_for(lambda goal=goal: metrics.exists() and metrics.read_text().count("\n") >= goal, process)
            time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
        saving += any(directory.glob(".step_*"))
        if not reached or (saving >= 2 and attempt >= 5):
            break
    assert saving >= 1, "no kill hit a save"
    assert attempt >= 4
    result = nanochat(base, *arguments)
    assert result.returncode == 0, result.stderr
    assert losses(base) == losses(whole) and len(losses(base)) == 60
    assert evaluations(base) == evaluations(whole)
    assert weights(base) == weights(whole)
    assert not list(directory.glob(".step_*"))


def test_mid_and_sft_resume_exactly(base, trained_base):
    shutil.copytree(Paths(trained_base).run / "checkpoints" / "base", Paths(base).run / "checkpoints" / "base")
    for stage, arguments in (("mid", TINY_MID), ("sft", TINY_SFT)):
        process, metrics = start(base, "train", stage, *arguments), Paths(base).run / "metrics" / f"{stage}.jsonl"
        directory = Paths(base).run / "checkpoints" / stage
        assert wait_for(lambda d=directory, m=metrics: any(d.glob("step_*")) and m.exists(), process)
        process.kill()
        process.communicate()
        result = nanochat(base, "train", stage, *arguments)
        assert result.returncode == 0 and f"resuming {stage} at step" in result.stdout, result.stderr
        assert losses(base, stage) == losses(trained_base, stage)
        assert weights(base, stage) == weights(trained_base, stage)


def test_one_process_resumes_what_two_have_trained(base):
    arguments = ["train", "base", *TINY_BASE, "--device-batch-size", "2"]
    result = nanochat(base, *arguments, "--num-iterations", "8", "--warmdown-ratio", "0", processes=2)
    assert result.returncode == 0, result.stderr
    meta = json.loads((Paths(base).run / "checkpoints" / "base" / "step_000008" / "meta.json").read_text())
    assert len(meta["positions"]) == 2
    first = losses(base)
    result = nanochat(base, *arguments, "--num-iterations", "8", "--warmdown-ratio", "0")
    assert result.returncode == 0 and "resuming base at step 8" in result.stdout
    assert losses(base) == first
    # the longer run resumes from there with one process
    path = Paths(base).run / "checkpoints" / "base" / "step_000008" / "meta.json"
    path.write_text(json.dumps(meta | {"settings": meta["settings"] | {"num_iterations": 12}}))
    result = nanochat(base, *arguments, "--num-iterations", "12", "--warmdown-ratio", "0")
    assert (
        result.returncode == 0 and "the checkpoint was written by 2 processes, and now there are 1" in result.stdout
    ), result.stderr
    after = losses(base)
    assert sorted(after) == list(range(12)) and {s: after[s] for s in range(8)} == first
    assert after[11][0] < first[0][0]


def test_out_of_memory_names_the_option_with_which_the_run_resumes(base, trained_base, monkeypatch, capsys):
    """In all three stages, with the losses of a run that had enough memory."""
    forward = GPT.forward
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    for arguments, last, fewer in (  # last: passes before the one that fails; base has one per step, mid four, sft two
        (["train", "base", *TINY_BASE], 9, "1"),
        (["train", "mid", *TINY_MID], 30, "2"),
        (["train", "sft", *TINY_SFT], 12, "2"),
    ):
        stage, passes = arguments[1], count()

        def full(*given, passes=passes, last=last, **options):
            if options.keys() <= {"loss_weight"} and next(passes) == last:  # a micro-step, not an evaluation
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(*given, **options)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(GPT, "forward", full)
            main(arguments)
        assert ended.value.code == 1
        assert "Tried to allocate 2.00 GiB); lower --device-batch-size" in capsys.readouterr().err
        again = nanochat(base, *arguments, "--device-batch-size", fewer)
        assert again.returncode == 0 and f"resuming {stage} at step" in again.stdout, again.stderr
        found, wanted = losses(base, stage), losses(trained_base, stage)
        assert found.keys() == wanted.keys()
        for step in wanted:
            assert found[step] == pytest.approx(wanted[step], rel=1e-3), f"{stage} {step}"


def test_other_settings_are_not_resumed(base):
    assert nanochat(base, "train", "base", *TINY_BASE, "--num-iterations", "4").returncode == 0
    result = nanochat(base, "train", "base", *TINY_BASE, "--num-iterations", "4", "--matrix-lr", "0.5")
    assert_fails_with(result, "other settings (optimizer)", "move")


def test_a_run_is_resumed_whatever_names_it(base):
    """By its name, by its preset, or after it was moved: the name of a run is not among what is learned."""
    train = ["train", "base", *TINY_BASE, "--eval-every", "-1"]
    nanochat(base, *train, "--num-iterations", "2")
    (base / "runs" / "default").rename(base / "runs" / "moved")
    again = nanochat(base, *train, "--num-iterations", "2", "--run-name", "moved")
    assert again.returncode == 0 and "resuming base at step 2" in again.stdout


def test_other_data_are_not_resumed(base, trained_base):
    """Texts changed in place, one shard more; and conversations changed in place, which midtraining has read."""
    shutil.copytree(Paths(trained_base).run / "checkpoints", Paths(base).run / "checkpoints")
    shutil.rmtree(Paths(base).run / "checkpoints" / "sft")
    kept = copy(base, "kept")
    shard = min((Paths(base).data / "text").glob("*.parquet"))
    texts = pq.read_table(shard).column("text").to_pylist()
    pq.write_table(pa.table({"text": [text[::-1] for text in texts]}), shard)
    shutil.copy(shard, Paths(base).data / "text" / "shard_00000b.parquet")
    chat = Paths(base).data / "chat" / "identity" / "conversations.jsonl"
    chat.write_text(chat.read_text().replace("I am", "I was"))
    for stage, arguments in (("base", TINY_BASE), ("mid", TINY_MID)):
        result = nanochat(base, "train", stage, *arguments)
        assert_fails_with(result, f"the data of {stage} are not those that", "bring those back to resume, or move")
        assert nanochat(kept, "train", stage, *arguments).returncode == 0


def test_a_stage_is_not_resumed_after_others_than_its_first_weights(base, trained_base):
    """It would be of the stage before it as that was, and say that it is trained."""
    checkpoints = Paths(base).run / "checkpoints"
    shutil.copytree(Paths(trained_base).run / "checkpoints", checkpoints)
    other_mid = [*TINY_MID, "--matrix-lr", "0.01"]
    for earlier, before, stage, arguments in (
        ("mid", other_mid, "sft", TINY_SFT),
        ("base", [*TINY_BASE, "--matrix-lr", "0.01"], "mid", other_mid),
    ):
        shutil.rmtree(checkpoints / earlier)
        assert nanochat(base, "train", earlier, *before).returncode == 0
        result = nanochat(base, "train", stage, *arguments)
        parts = f"the weights at the start of {stage} are not those that", f"move {checkpoints / stage} away"
        assert_fails_with(result, *parts)


def test_data_that_fill_no_step_leave_no_checkpoint(base, trained_base):
    """The stage after it would take such a checkpoint for a trained one."""
    shutil.copytree(Paths(trained_base).run / "checkpoints" / "base", Paths(base).run / "checkpoints" / "base")
    few = "--smoltalk 1 --mmlu 0 --gsm8k 0 --simple-spelling 0 --spelling-bee 0 --identity-repeats 0 --total-batch-size 4096"
    result = nanochat(base, "train", "mid", *TINY_MID, *few.split())
    assert_fails_with(result, "the data of mid do not fill one step of 32 micro-batches on each of 1 processes")
    assert not any((Paths(base).run / "checkpoints" / "mid").glob("step_*"))


def test_not_a_number_stops_training_and_names_the_tensor(base, trained_base):
    directory = Paths(base).run / "checkpoints" / "base"
    shutil.copytree(Paths(trained_base).run / "checkpoints" / "base", directory)
    shutil.rmtree(directory / "step_000024")
    path = directory / "step_000020" / "model.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.mlp.expand.weight"][3, 5] = float("nan")
    save_file(tensors, path)
    meta = json.loads((directory / "step_000020" / "meta.json").read_text())
    meta["files"][path.name]["sha256"] = sha256_of(path)
    (directory / "step_000020" / "meta.json").write_text(json.dumps(meta))
    result = nanochat(base, "train", "base", *TINY_BASE)
    assert_fails_with(result, "step 20", "a weight is not finite", "weight blocks.0.mlp.expand.weight", "step_000020")


def test_an_exploding_learning_rate_is_caught(base):
    result = nanochat(base, "train", "base", *TINY_BASE, "--matrix-lr", "1e38", "--grad-clip", "0")
    assert_fails_with(result, "offending tensor: ", "last good checkpoint", "lower the learning rates")


def test_weights_that_are_not_finite_are_not_saved(base):
    """Those of the last step, after which there is no loss that would show it."""
    result = nanochat(base, "train", "base", *TINY_BASE, "--num-iterations", "1", "--matrix-lr", "1e300")
    assert_fails_with(
        result, "step 1 of base: a weight is not finite; offending tensor: weight blocks.0", "checkpoint: none"
    )
    assert not any((Paths(base).run / "checkpoints" / "base").glob("step_*"))


def test_logging_never_alters_training(base, trained_base, tmp_path):
    for name, content in {
        "works": "class Run:\n    def log(self, *a, **k): pass\n    def finish(self): pass\ndef init(**k):\n"
        "    assert k['mode'] == 'offline', k\n    return Run()\n",
        "fails": "def init(**k):\n    raise RuntimeError('login failed')\n",
        "breaks": "class Run:\n    n = 0\n    def log(self, *a, **k):\n        self.n += 1\n        if self.n > 3:\n"
        "            raise OSError('gone')\n    def finish(self): raise OSError('gone')\ndef init(**k): return Run()\n",
    }.items():
        module = tmp_path / f"module-{name}"
        module.mkdir()
        (module / "wandb.py").write_text(content)
        logged = copy(base, name)
        result = nanochat(logged, "train", "base", *TINY_BASE, "--wandb-run", name, PYTHONPATH=str(module))
        assert result.returncode == 0, result.stderr
        assert ("training continues" in result.stdout) == (name != "works")
        assert losses(logged) == losses(trained_base) and weights(logged) == weights(trained_base)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--total-batch-size", "100"], ("100 tokens is not a multiple of the 128", "nearest valid totals are 128")),
        (["--total-batch-size", "300"], ("nearest valid totals are 256 or 384",)),
        (["--depth", "0"], ("--depth must be between 1 and 1000, got 0",)),
        (["--n-kv-head", "3"], ("n_kv_head 3 does not divide",)),
        (["--device", "tpu"], ("device 'tpu' is not available",)),
        (["--impl.attention", "nonsense"], ("attention", "nonsense")),
    ],
)
def test_bad_options_leave_nothing_behind(base, arguments, parts):
    before = sorted(base.rglob("*"))
    assert_fails_with(nanochat(base, "train", "base", *TINY_BASE, *arguments), *parts)
    assert sorted(base.rglob("*")) == before


def test_a_mistake_in_the_bundle_is_found_before_training(base):
    items = Paths(base).eval_bundle / "eval_data" / "world_choice.jsonl"
    items.write_text('{"query": 7}\n')
    result = nanochat(base, "train", "base", *TINY_BASE, "--core-metric-every", "0")
    assert_fails_with(result, "world_choice.jsonl, line 1")
    assert not (Paths(base).run / "checkpoints").exists()


def test_a_step_without_anything_to_learn_ends_the_run(trained_base, tmp_path):
    """Its loss would be 0, which was not measured: the questions alone fill the 32 tokens of a row."""
    base = shutil.copytree(trained_base, tmp_path / "base")
    shutil.rmtree(Paths(base).run / "checkpoints" / "sft")
    for path in (Paths(base).data / "chat" / "identity").iterdir():
        path.unlink()
    talk = [{"role": "user", "content": "who are you? " * 30}, {"role": "assistant", "content": "nobody"}]
    (Paths(base).data / "chat" / "identity" / "conversations.jsonl").write_text(f"{json.dumps(talk)}\n" * 16)
    others = "--arc-easy 0 --arc-challenge 0 --gsm8k 0 --smoltalk 0 --identity 16 --simple-spelling 0 --spelling-bee 0".split()
    result = nanochat(base, "train", "sft", *TINY_SFT, *others, "--eval-every", "-1")
    assert_fails_with(result, "step 0 of sft has nothing to learn", "within the context length")
    assert "loss" not in result.stdout


def test_a_checkpoint_of_another_model_is_noticed_before_the_model_is_made(trained_base, cpu, monkeypatch):
    monkeypatch.setattr(GPT, "create", lambda *_: pytest.fail("a model of depth 20 was made"))
    with pytest.raises(UserError, match=r"of another model: depth 20 \(saved 1\).*--run-name NAME"):
        pretrain(TrainBaseOptions(), Paths(trained_base), cpu)
