"""Checkpoints: saved as a whole or not at all; rejected when damaged or of another model; loaded by another number of processes."""

import json
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from nanochat.checkpoint import CheckpointStore, create_model, damaged, load_model, load_weights, read_meta
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import sha256_of
from nanochat.platform.paths import Paths, steps_in
from nanochat.speedrun.stages import STAGES
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


def test_only_names_that_are_exactly_a_step_are_checkpoints(tmp_path):
    paths = Paths(tmp_path)
    directory = paths.checkpoints("base")
    store = saved(directory, step=7)
    for copy in (
        "step_000007_backup",
        "step_000009.old",
        "step_9",
        "step_0000010",
        "step_",
        "step_+00011",
        "step_00١٢٣٤",
    ):
        shutil.copytree(store.path(7), directory / copy)
    (directory / "step_000012").mkdir()  # has nothing
    (directory / "step_000013").write_text("a file")
    saved(directory, step=1_000_001)
    names = {path.name for path in directory.iterdir()}
    assert store.steps() == [7, 1_000_001] and {path.name for path in steps_in(directory).values()} <= names
    [stage] = [stage for stage in STAGES if stage.name == "base"]
    assert {path.parent.name for path in stage.outputs(paths)} == {"step_1000001"}
    saved(directory, step=1_000_002)  # removes the oldest, and nothing that is no checkpoint
    assert store.steps() == [1_000_001, 1_000_002]
    assert names - {"step_000007"} < {path.name for path in directory.iterdir()}


def test_a_loaded_checkpoint_takes_the_same_next_step(tmp_path):
    model, optimizer, _ = train_three_steps()
    store = CheckpointStore(tmp_path, runtime())
    store.save(3, model, optimizer, META)
    other, other_optimizer = GPT.create(SMALL, seed=5), None
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


STATE = "state/shard-00001-model-00001-of-00001.safetensors"


def loaded(store: CheckpointStore, step: int) -> dict:
    model = GPT.create(SMALL, seed=5)
    return store.load(step, model, MuonAdamW(model), FakeTokenizer)


def rewrite_meta(store: CheckpointStore, **changes) -> None:
    path = store.path(3) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["model.safetensors", STATE, "meta.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "one bit"])
def test_damage_is_found_before_loading_and_the_checkpoint_before_it_is_named(tmp_path, name, how):
    store = saved(tmp_path, 2)
    saved(tmp_path, 3)
    path = store.path(3) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content[:-7] if how == "cut" else content)
    if how == "gone":
        path.unlink()
    with pytest.raises(
        UserError, match=f"remove {store.path(3)} and run the same command again: it then takes .*step_000002"
    ):
        loaded(store, 3)
    shutil.rmtree(store.path(3))
    assert loaded(store, 2)["step"] == 2


def test_the_checkpoint_before_it_is_that_of_the_step_before(tmp_path):
    """Whose name is shorter after a million steps."""
    for step in (999_998, 999_999, 1_000_000):
        store = saved(tmp_path, step, keep=3)
    (store.path(1_000_000) / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="it then takes .*step_999999, which is whole"):
        loaded(store, 1_000_000)
    with pytest.raises(UserError, match="no whole checkpoint is before it"):
        raise damaged(store.path(999_998), "damaged")


def test_without_a_whole_checkpoint_before_it_the_stage_is_trained_again(tmp_path):
    store = saved(tmp_path, 2)
    saved(tmp_path, 3)
    for step in (2, 3):
        (store.path(step) / "model.safetensors").write_bytes(b"short")
    with pytest.raises(
        UserError, match="has 5 bytes instead of .*; no whole checkpoint is before it: remove .*step_000003"
    ):
        loaded(store, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 2}, "is of step 2"),
        ({"step": "3"}, r"\['step'\] is '3', wanted an integer"),
        ({"files": []}, r"\['files'\] is '\[\]', wanted an object"),
        ({"files": {"../model.safetensors": 4}}, "does not list the files of a checkpoint"),
        ({"config": None}, r"\['config'\] is 'None', wanted an object"),
    ],
)
def test_meta_of_another_shape_is_rejected(tmp_path, changes, message):
    store = saved(tmp_path)
    rewrite_meta(store, **changes)
    with pytest.raises(UserError, match=message):
        read_meta(store.path(3))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_meta_that_is_no_object_is_rejected(tmp_path, text):
    store = saved(tmp_path)
    (store.path(3) / "meta.json").write_text(text)
    with pytest.raises(UserError, match="step_000003"):
        read_meta(store.path(3))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 10**9}, "is of a model of .* bytes, and model.safetensors has"),
        ({"context_length": 10**12}, "a context of 1000000000000 tokens is longer than 1000000"),
        ({"n_head": 0}, "meta.json.*must be at least 1"),
    ],
)
def test_sizes_that_no_such_model_has_are_rejected(tmp_path, sizes, message):
    store = saved(tmp_path)
    rewrite_meta(store, config=read_meta(store.path(3))["config"] | sizes)
    with pytest.raises(UserError, match=message):
        read_meta(store.path(3))


@pytest.mark.parametrize("change", ["one row", "missing", "another"])
def test_weights_of_another_shape_are_rejected(tmp_path, change):
    """Also if size and hash are right: copying a single row would fill all rows with it."""
    store = saved(tmp_path)
    path = store.path(3) / "model.safetensors"
    weights = load_file(path)
    if change == "one row":
        weights["head.weight"] = weights["head.weight"][:1].clone()
    elif change == "missing":
        del weights["head.weight"]
    else:
        weights["tail.weight"] = weights["head.weight"].clone()
    save_file(weights, path)
    files = read_files(store)
    rewrite_meta(store, files=files | {"model.safetensors": {"bytes": path.stat().st_size, "sha256": sha256_of(path)}})
    name = "tail.weight" if change == "another" else "head.weight"
    with pytest.raises(UserError, match=rf"{name} is .*, wanted"):
        loaded(store, 3)


def read_files(store: CheckpointStore) -> dict:
    return json.loads((store.path(3) / "meta.json").read_text())["files"]


def test_a_flipped_bit_in_the_weights_is_seen_where_nothing_is_trained(tmp_path):
    store = saved(tmp_path)
    meta, path = read_meta(store.path(3)), store.path(3) / "model.safetensors"
    assert create_model(store.path(3), SMALL, runtime(), meta).config == SMALL
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not what was saved .its SHA-256 differs."):
        create_model(store.path(3), SMALL, runtime(), meta)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


def test_nothing_in_a_checkpoint_runs_code(tmp_path):
    """A pickle in place of any file, with its right size and hash, or where torch.distributed.checkpoint keeps one by default."""
    witness = tmp_path / "witness"
    payload = pickle.dumps(Payload(witness))
    for name in (*read_files(saved(tmp_path / "a")), "meta.json", "state/.metadata"):
        store = saved(tmp_path / name.replace("/", "_"))
        path = store.path(3) / name
        path.write_bytes(payload)
        if name != "meta.json" and name in read_files(store):
            rewrite_meta(store, files=read_files(store) | {name: {"bytes": len(payload), "sha256": sha256_of(path)}})
        with pytest.raises(UserError):
            loaded(store, 3)
        assert not witness.exists(), name


def test_a_checkpoint_of_an_earlier_version_is_evaluated_but_not_resumed(tmp_path):
    """It has sizes without hashes, and state with a pickle."""
    store = saved(tmp_path)
    (store.path(3) / "state" / ".metadata").write_bytes(b"pickle")
    sizes = {name: content["bytes"] for name, content in read_files(store).items()}
    rewrite_meta(store, files=sizes)
    model = GPT.create(SMALL, seed=5)
    read_meta(store.path(3))
    load_weights(store.path(3), model)
    with pytest.raises(
        UserError, match="in a format that can run code .* is not read; its weights can still be evaluated"
    ):
        loaded(store, 3)


def test_what_a_kill_left_behind_is_swept(tmp_path):
    store = saved(tmp_path, 1)
    for name in (".step_000002.tmp", ".step_000000.old"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
    store.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_another_tokenizer_or_another_model_is_rejected(tmp_path):
    store = saved(tmp_path)
    other = type("Other", (), {"hash": "o" * 64})
    with pytest.raises(UserError, match="another tokenizer"):
        read_meta(store.path(3), other)
    model = GPT.create(type(SMALL).from_depth(2, 301, 16))
    with pytest.raises(UserError, match=r"another model: depth 2 \(saved 3\), width 128 \(saved 192\)"):
        store.load(3, model, MuonAdamW(model), FakeTokenizer)


def worker(rank: int, world_size: int, port: int, directory: str, load: bool) -> None:
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
    directory = Paths(base).run / "checkpoints" / "base"
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
    path = Paths(base).run / "tokenizer" / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["ranks"][300], stored["ranks"][301] = stored["ranks"][301], stored["ranks"][300]
    path.write_text(json.dumps(stored))
    assert_fails_with(nanochat(base, "chat", "-p", "hi", "--source", "base"), "another tokenizer", "restore")
    assert_fails_with(nanochat(base, "train", "base", *TINY_BASE), "another tokenizer")
