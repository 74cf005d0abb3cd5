"""Preflight: each asset taken away in turn is named with its stages and the remedy; no loader reads what is not listed."""

import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch

import nanochat.tasks.rows
from nanochat.evaluate.chat import TASKS
from nanochat.gpt import GPTConfig
from nanochat.options.presets import PRESETS, with_preset
from nanochat.options.speedrun import PreflightOptions, SpeedrunOptions
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainSftOptions
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.speedrun.assets import assets, note_fetched, problems
from nanochat.speedrun.preflight import _estimate, preflight
from nanochat.speedrun.run import run_stages
from nanochat.speedrun.stages import NAMES
from nanochat.synthetic.generate import generate
from nanochat.train.finetune import sft_mixture
from nanochat.train.midtrain import mid_mixture
from tests.conftest import TINY_DATA
from tests.nanochat.models import on_card
from tests.nanochat.speedrun.world_of_d20 import on_disk, parquet

SHARDS = 3
LIST = assets("d20", SHARDS)


@pytest.fixture(scope="module")
def d20(tmp_path_factory):
    base = tmp_path_factory.mktemp("d20")
    on_disk(base, SHARDS)
    return Paths(base)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("preflight looked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def check(paths: Paths) -> None:
    preflight(PreflightOptions("d20", SHARDS, data_only=True), paths)


def test_all_is_there(d20, capsys):
    check(d20)
    out = capsys.readouterr().out
    assert all(f"ok   {asset.name}: " in out for asset in LIST) and "everything is there" in out


@pytest.mark.parametrize("asset", LIST, ids=lambda asset: asset.name)
def test_each_asset_taken_away(d20, asset, tmp_path):
    file = asset.present(d20)[0] if asset.name != "eval_bundle" else d20.eval_bundle
    away = tmp_path / "away"
    shutil.move(file, away)
    try:
        with pytest.raises(UserError) as error:
            check(d20)
    finally:
        shutil.move(away, file)
    assert f"fetch it on a node with internet: nanochat fetch --only {asset.name} --preset d20" in str(error.value)
    assert all(stage in str(error.value) for stage in asset.stages) and set(asset.stages) <= set(NAMES)
    # one missing asset is one problem: the others are not named
    assert "more, see above" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "spoil", "named"),
    [
        ("gsm8k/test", lambda data, columns: data[:-40], "is truncated or of another format"),
        (
            "gsm8k/test",
            lambda data, columns: parquet(7_473, columns),
            "it has 7,473 rows, wanted 1,319: it is another configuration",
        ),
        (
            "mmlu/test",
            lambda data, columns: parquet(14_042, ("a", "b")),
            "rows of a, b; wanted question, choices, answer",
        ),
        ("humaneval/test", lambda data, columns: parquet(0, columns), "has 0 rows"),
        ("text", lambda data, columns: b"<html>not found</html>", "is truncated or of another format"),
        ("identity", lambda data, columns: data[:-30], "is truncated or of another format"),
        ("words", lambda data, columns: b"a\nb\n", "it has 2 rows, wanted 370,105"),
    ],
)
def test_what_is_spoilt_is_no_data(d20, name, spoil, named):
    asset = next(asset for asset in LIST if asset.name == name)
    file = asset.present(d20)[0]
    content = file.read_bytes()
    try:
        file.write_bytes(spoil(content, asset.columns))
        found = [problem for _, _, problem in problems("d20", d20, SHARDS) if problem]
    finally:
        file.write_bytes(content)
    assert len(found) == 1 and named in found[0] and found[0].startswith(name)


def test_a_users_own_identity_file_may_have_any_number_of_lines(d20):
    asset = next(asset for asset in LIST if asset.name == "identity")
    file = asset.present(d20)[0]
    content = file.read_bytes()
    try:
        file.write_bytes(b"\n".join(content.splitlines()[:3]))
        assert not [problem for _, _, problem in problems("d20", d20, SHARDS) if problem]
    finally:
        file.write_bytes(content)


def test_a_file_that_shrank_after_it_was_fetched(d20):
    asset = next(asset for asset in LIST if asset.name == "words")
    note_fetched(d20, asset, {"words.txt": [1, ""]})
    try:
        [problem] = [problem for _, _, problem in problems("d20", d20, SHARDS) if problem]
    finally:
        d20.assets.unlink()
    assert problem.endswith("of 1 bytes") and "words.txt has" in problem


def test_a_run_without_its_data_does_not_begin(tmp_path):
    with pytest.raises(
        UserError, match="nanochat fetch --preset d20; nanochat preflight names everything that is missing"
    ):
        run_stages(SpeedrunOptions(preset="d20"), Paths(tmp_path))
    assert not (tmp_path / "runs").exists()  # an empty run would be the newest one


def test_a_machine_without_a_gpu_is_an_error(d20):
    with pytest.raises(UserError, match="no GPU here"):
        preflight(PreflightOptions("d20", SHARDS), d20)


def test_preflight_warns_when_the_job_is_too_short(monkeypatch, capsys):
    base = with_preset(TrainBaseOptions(), "train base", "d20")
    model = GPTConfig.from_depth(base.depth, 65536)
    runtime = Runtime(0, 1, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(Runtime, "device_name", "NVIDIA A100-SXM4-80GB")
    for hours, warned in ((3, True), (24, False)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 3600 * hours)))
        _estimate(base, model, runtime, 8)
        out = capsys.readouterr().out
        assert "time: about 11.8 h from the beginning" in out and ("saved and queued again" in out) == warned


@pytest.mark.parametrize(("card", "rows"), [("A100 40 GB", 22), ("H200 141 GB", 32)])
def test_preflight_says_what_fits_into_the_memory(d20, monkeypatch, capsys, card, rows):
    on_card(monkeypatch, card)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr("nanochat.speedrun.preflight.pick_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    preflight(PreflightOptions("d20", SHARDS), d20)
    assert f"ok   memory: micro-batches of up to {rows} rows fit into the" in capsys.readouterr().out
    monkeypatch.setattr(Runtime, "memory", 8 * 2**30)
    with pytest.raises(
        UserError, match="preflight of d20: a model of depth 20 with one row of 2048 tokens needs about .* GB"
    ):
        preflight(PreflightOptions("d20", SHARDS), d20)


def test_loaders_read_only_what_is_listed(world, monkeypatch):
    asked = set()
    load = nanochat.tasks.rows.load_rows

    def recording(paths, source, split, shape, *check):
        asked.add((f"{source}/{split}", tuple(shape)))
        return load(paths, source, split, shape, *check)

    for module in ("gsm8k", "humaneval", "arc", "mmlu", "smoltalk"):
        monkeypatch.setattr(f"nanochat.tasks.{module}.load_rows", recording)
    mid_mixture(TrainMidOptions(), world), sft_mixture(TrainSftOptions(mmlu=1), world)
    for make in TASKS.values():
        make(world)
    listed = {asset.name: asset.columns for preset in PRESETS for asset in assets(preset)}
    for name, columns in asked:
        if name != "identity/conversations":
            assert set(columns) <= set(listed[name]), name
    assert len(asked) >= 11


def test_what_killed_saves_left_counts_as_free(tmp_path, monkeypatch, capsys):
    """The stages remove it when they start, which they would never do if preflight refused them for it."""
    paths = Paths(tmp_path, "tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="disk: 0.0 GB free, checkpoints take up to"):
        preflight(PreflightOptions("tiny"), paths)
    for name in (".step_000020.tmp/state", ".step_000010.old"):
        (paths.checkpoints("mid") / name).mkdir(parents=True)
        with (paths.checkpoints("mid") / name / "weights").open("wb") as file:
            file.truncate(10**9)
    preflight(PreflightOptions("tiny"), paths)
    assert "disk: 2.0 GB free" in capsys.readouterr().out


def test_the_disk_is_checked_for_the_stages_that_the_run_has(tmp_path, capsys):
    """Two checkpoints of each, and one while it is written; those that are there need no more space."""

    def gigabytes(*stages: str, rl: bool) -> float:
        paths = Paths(tmp_path / "-".join(stages), "d20")
        for stage in stages:
            step = paths.checkpoints(stage) / "step_000010"
            step.mkdir(parents=True, exist_ok=True)
            (step / "meta.json").write_text("{}")
        with pytest.raises(UserError):  # there is no data and no GPU
            preflight(PreflightOptions("d20", rl=rl), paths)
        return float(capsys.readouterr().out.partition("checkpoints take up to ")[2].split()[0])

    checkpoint = gigabytes(rl=False) / 7
    for stages, rl, wanted in (((), True, 9), (("rl",), False, 7), (("rl",), True, 8), (("sft", "rl"), False, 6)):
        assert gigabytes(*stages, rl=rl) == pytest.approx(wanted * checkpoint, abs=0.2), (stages, rl)


def test_generated_data_that_cannot_be_read(tmp_path, capsys):
    paths = Paths(tmp_path, "tiny")
    generate(TINY_DATA, paths)
    preflight(PreflightOptions("tiny", data_only=True), paths)
    assert "ok   data: the run generated them" in capsys.readouterr().out
    shard = paths.text / "shard_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:5000])
    (paths.embedded / ".notes.swp").write_bytes(b"\xff")  # nothing that training reads
    with pytest.raises(UserError, match=f"{shard} cannot be read .*data generate --run-name tiny --changed replace"):
        preflight(PreflightOptions("tiny", data_only=True), paths)
