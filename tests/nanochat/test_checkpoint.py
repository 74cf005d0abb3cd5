"""Checkpoints: saved as a whole or not at all; rejected when damaged or of another model; loaded by another number of processes."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist

from nanochat.checkpoint import CheckpointStore, load_model, read_meta
from nanochat.gpt import GPT
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from tests import forked
from tests.conftest import TINY_BASE, assert_fails_with, environment, nanochat
from tests.nanochat.models import SMALL, rows_of, train_three_steps
from tests.processes import spawn


class FakeTokenizer:
    hash = "t" * 64


META = {"tokenizer": FakeTokenizer.hash}


def runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    return Runtime(rank, world_size, torch.device("cpu"), torch.float32)


def saved(directory, step: int = 3, keep: int = 2) -> CheckpointStore:
    model, optimizer, _ = train_three_steps()
    store = CheckpointStore(directory, runtime(), keep)
    store.save(step, model, optimizer, META)
    return store


def train_a_step(model: GPT, optimizer, rank: int = 0, world_size: int = 1) -> None:
    rows = rows_of(9)[rank::world_size]
    model(rows[:, :-1], rows[:, 1:]).backward()
    optimizer.synchronize()
    optimizer.update(0.5, 0.95)


def test_a_loaded_checkpoint_takes_the_same_next_step(tmp_path):
    model, optimizer, _ = train_three_steps()
    store = CheckpointStore(tmp_path, runtime())
    store.save(3, model, optimizer, META)
    other, other_optimizer = GPT.create(SMALL, seed=5), None
    from nanochat.optim import MuonAdamW

    other_optimizer = MuonAdamW(other)
    random_state = torch.get_rng_state()
    torch.rand(5)
    meta = store.load(3, other, other_optimizer, FakeTokenizer)
    assert meta["step"] == 3 and torch.equal(torch.get_rng_state(), random_state)
    train_a_step(model, optimizer)
    train_a_step(other, other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_checkpoints_and_no_temporary_files_remain(tmp_path):
    store = saved(tmp_path, 1)
    for step in (2, 3):
        saved(tmp_path, step)
    assert store.steps() == [2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_what_a_kill_left_behind_is_neither_loaded_nor_kept(tmp_path):
    store = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / ".step_000002.tmp")
    (tmp_path / ".step_000002.tmp" / "rubbish").write_text("x")
    assert store.steps() == [1]
    saved(tmp_path, 2)
    assert store.steps() == [1, 2] and not (tmp_path / "step_000002" / "rubbish").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state/.metadata", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damage_is_found_before_loading(tmp_path, name, how):
    store = saved(tmp_path)
    path = store.path(3) / name
    content = path.read_bytes()
    path.write_bytes(content[:-7]) if how == "cut" else path.unlink()
    with pytest.raises(UserError, match="remove"):
        read_meta(store.path(3), FakeTokenizer)


def test_another_tokenizer_or_another_model_is_rejected(tmp_path):
    from nanochat.optim import MuonAdamW

    store = saved(tmp_path)
    other = type("Other", (), {"hash": "o" * 64})
    with pytest.raises(UserError, match="another tokenizer"):
        read_meta(store.path(3), other)
    model = GPT.create(type(SMALL).from_depth(2, 301, 16))
    with pytest.raises(UserError, match=r"another model: depth 2 \(saved 3\), width 128 \(saved 192\)"):
        store.load(3, model, MuonAdamW(model), FakeTokenizer)


def worker(rank: int, world_size: int, port: int, directory: str, load: bool) -> None:
    from nanochat.optim import MuonAdamW

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    store = CheckpointStore(__import__("pathlib").Path(directory), runtime(rank, world_size))
    if load:
        model = GPT.create(SMALL, seed=5)
        optimizer = MuonAdamW(model)
        store.load(3, model, optimizer, FakeTokenizer)
    else:
        model, optimizer, _ = train_three_steps(rank, world_size)
        store.save(3, model, optimizer, META)
    train_a_step(model, optimizer, rank, world_size)
    torch.save(model.state_dict(), f"{directory}/after-{world_size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("save", "load"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_of_processes_resumes_with_the_same_losses(save, load, tmp_path):
    """With 4 processes one has no matrix of a shape, because three ranks have one of the three matrices each."""
    from nanochat.optim import MuonAdamW

    spawn(worker, save, str(tmp_path), False) if save > 1 else saved(tmp_path)
    reference = GPT.create(SMALL, seed=5)
    optimizer = MuonAdamW(reference)
    if save == 1 or load == 1:
        CheckpointStore(tmp_path, runtime()).load(3, reference, optimizer, FakeTokenizer)
        train_a_step(reference, optimizer)
        expected = reference.state_dict()
    if load > 1:
        spawn(worker, load, str(tmp_path), True)
        results = torch.load(tmp_path / f"after-{load}-0.pt")
        expected = expected if save == 1 else torch.load(tmp_path / f"after-{save}-0.pt")
    else:
        results, expected = expected, torch.load(tmp_path / f"after-{save}-0.pt")
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=1e-3, atol=2e-4)


def test_a_full_disk_loses_nothing_saved(base):
    """A limit on file sizes stands in for the full disk: the operating system refuses the write in the same place."""
    result = nanochat(base, "train", "base", *TINY_BASE, "--num-iterations", "8")
    assert result.returncode == 0, result.stderr
    directory = base / "checkpoints" / "base"
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    shutil.rmtree(directory / "step_000008")
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); sys.argv[0] = 'nanochat'; "
    limited += "from nanochat.cli import main; main()"
    run = forked.run("-c", limited, "train", "base", *TINY_BASE, "--num-iterations", "8", env=environment(base))
    assert_fails_with(
        run, "cannot save the checkpoint of step 8", "step_000004", "File too large", "check the path and its disk"
    )
    after = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert after == {p: content for p, content in before.items() if "step_000008" not in str(p)}
    assert [p.name for p in directory.iterdir()] == ["step_000004"]
    assert nanochat(base, "train", "base", *TINY_BASE, "--num-iterations", "8").returncode == 0
    assert (directory / "step_000008" / "model.safetensors").read_bytes() == before[
        directory / "step_000008" / "model.safetensors"
    ]


def test_the_error_for_a_missing_model_lists_those_that_exist(base, cpu):
    with pytest.raises(UserError, match="no checkpoint of sft; there are: none; train it with: nanochat train sft"):
        load_model(Paths(base), "sft", cpu)


def test_a_tokenizer_that_does_not_match_is_rejected(trained_base, tmp_path):
    base = shutil.copytree(trained_base, tmp_path / "base")
    path = base / "tokenizer" / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["ranks"][300], stored["ranks"][301] = stored["ranks"][301], stored["ranks"][300]
    path.write_text(json.dumps(stored))
    assert_fails_with(nanochat(base, "chat", "-p", "hi", "--source", "base"), "another tokenizer", "restore")
    assert_fails_with(nanochat(base, "train", "base", *TINY_BASE), "another tokenizer")
