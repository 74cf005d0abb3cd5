"""Nothing is deleted or overwritten that nanochat did not write, and runs in one base directory do not touch each other."""

import subprocess

import pytest

from nanochat.options.data import GenerateOptions
from nanochat.options.speedrun import SpeedrunOptions
from nanochat.platform.errors import UserError
from nanochat.platform.files import all_files
from nanochat.platform.paths import Paths
from nanochat.speedrun.run import run_stages
from nanochat.speedrun.stages import Stage
from nanochat.synthetic.generate import generate
from tests.conftest import TINY_DATA, assert_fails_with, nanochat
from tests.nanochat.speedrun.test_speedrun import TINY_STAGES, start_stage

DATA, TOKENIZER = TINY_STAGES[:2]
FOREIGN = (
    *(f"text/shard_{number:05d}.parquet" for number in range(7)),
    *"eval_bundle/core.yaml chat/identity/conversations.jsonl words.txt tokenizer/tokenizer.pkl report/report.md".split(),
    *"base_checkpoints/d20/meta.json gate.json".split(),
)


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Runs stages, as forks, in a run of the base directory tmp_path, and returns its paths."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.speedrun.run.subprocess.Popen", start_stage)

    def run(*chosen: Stage, name: str = "cpu", **options) -> Paths:
        paths = Paths(tmp_path, name)
        run_stages(SpeedrunOptions(last="tokenizer", **options), paths, chosen)
        return paths

    return run


def contents(paths: Paths) -> dict:
    return {path: path.read_bytes() for path in all_files(paths.base)}


def replaced_by_a_user(paths: Paths) -> list:
    """Another identity file, one more shard of text, and a link in place of the words."""
    identity, more = paths.chat_data / "identity" / "conversations.jsonl", paths.text / "shard_00000b.parquet"
    identity.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n')
    more.write_bytes((paths.text / "shard_00000.parquet").read_bytes())
    return [identity, more]


def test_the_first_stages_leave_what_others_put_into_the_base_directory(stages, tmp_path):
    """Fetched data, and the files of the original nanochat, whose base directory has the same default."""
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"mine: {name}")
    before = contents(Paths(tmp_path))
    made = stages(DATA, TOKENIZER)
    after = contents(made)
    assert {path: after.get(path) for path in before} == before
    assert all(path.is_relative_to(made.run) for path in after.keys() - before)
    assert len(list(made.text.glob("*"))) == 3 and made.text.is_relative_to(made.run)


def test_generating_again_does_not_delete_what_a_user_changed(tmp_path):
    paths = Paths(tmp_path)
    generate(TINY_DATA, paths)
    original = contents(paths)
    changed = replaced_by_a_user(paths)
    paths.words.unlink()
    paths.words.symlink_to(changed[0])
    before = contents(paths)
    with pytest.raises(
        UserError, match="shard_00000b.parquet.*words.txt; .*--changed keep; .*--changed replace"
    ) as error:
        generate(TINY_DATA, paths)
    assert str(changed[0]) in str(error.value) and contents(paths) == before
    assert generate(GenerateOptions(changed="keep"), paths) and contents(paths) == before and paths.words.is_symlink()
    generate(GenerateOptions(**{**vars(TINY_DATA), "changed": "replace"}), paths)
    assert contents(paths) == original and not paths.words.is_symlink()


def test_data_without_a_manifest_are_not_deleted(tmp_path):
    paths = Paths(tmp_path)
    paths.embedded.mkdir(parents=True)
    (paths.embedded / "notes").write_text("mine")
    with pytest.raises(UserError, match="embedded/notes; "):
        generate(TINY_DATA, paths)
    assert (paths.embedded / "notes").read_text() == "mine"


def test_a_speedrun_asks_about_files_that_have_changed_since(stages, capfd):
    paths = stages(DATA, TOKENIZER)
    changed = replaced_by_a_user(paths)
    tokenizer = paths.tokenizer / "token_bytes.npy"
    before = contents(paths)
    for options in ({}, {"first": "tokenizer"}):
        with pytest.raises(
            UserError, match="stage data has finished, and these files of it have changed since"
        ) as error:
            stages(DATA, TOKENIZER, **options)
        assert all(str(path) in str(error.value) for path in changed) and contents(paths) == before
    capfd.readouterr()
    stages(DATA, TOKENIZER, changed="keep")
    assert "tokenizer: done" in capfd.readouterr().out  # its input has changed
    assert all(path.read_bytes() == before[path] for path in changed)
    stages(DATA, TOKENIZER)
    assert capfd.readouterr().out.count("finished before, skipped") == 2
    tokenizer.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"stage tokenizer has finished, .*: {tokenizer}; "):
        stages(DATA, TOKENIZER)
    assert tokenizer.read_bytes() == b"mine"
    stages(DATA, TOKENIZER, changed="replace")
    assert tokenizer.read_bytes() != b"mine" and "tokenizer: done" in capfd.readouterr().out


def test_replacing_the_data_of_a_speedrun(stages):
    paths = stages(DATA)
    before = contents(paths)
    replaced_by_a_user(paths)
    stages(DATA, changed="replace")
    after = contents(paths)
    assert {path: after.get(path) for path in before if path.is_relative_to(paths.embedded)} == {
        path: content for path, content in before.items() if path.is_relative_to(paths.embedded)
    }


def test_runs_do_not_collide(stages):
    """As two presets in one base directory, of which the first has checkpoints."""
    first = stages(DATA, TOKENIZER, name="cpu")
    (first.checkpoints("base") / "step_000001").mkdir(parents=True)
    (first.checkpoints("base") / "step_000001" / "meta.json").write_text("{}")
    before = contents(first)
    larger = Stage("tokenizer", ("tokenizer", "train", "--vocab-size", "600"), TOKENIZER.outputs, has_preset=False)
    second = stages(DATA, larger, name="tiny")
    assert contents(first).items() >= before.items()
    assert (second.tokenizer / "tokenizer.json").read_bytes() != (first.tokenizer / "tokenizer.json").read_bytes()
    assert second.runs == ["cpu", "tiny"]
    (first.report / "sections").mkdir(exist_ok=True)
    (first.report / "sections" / "base.json").write_text("{}")
    assert second.runs == ["tiny", "cpu"]


def test_commands_take_the_run_that_is_named_or_the_newest(base):
    (base / "runs" / "default").rename(base / "runs" / "cpu")
    assert_fails_with(
        nanochat(base, "train", "base"), "no tokenizer in", "runs/default", "other runs: cpu (--run-name)"
    )
    assert_fails_with(nanochat(base, "chat", "-p", "hi"), "no checkpoint of sft", "nanochat train sft --run-name cpu")
    evaluated = nanochat(base, "evaluate", "base", "--run-name", "other")
    assert_fails_with(evaluated, "no checkpoint of base", "about the run other, other runs: cpu")
    assert_fails_with(nanochat(base, "chat", "--run-name", "../cpu"), "--run-name '../cpu' must begin with a letter")


def test_a_run_of_an_earlier_version_is_moved_by_the_command_in_the_message(trained_base, tmp_path):
    old = tmp_path / "old; of mine"
    subprocess.run(["cp", "-r", trained_base / "runs" / "default", old], check=True)
    refused = nanochat(old, "speedrun", "--preset", "cpu")
    assert_fails_with(refused, "holds a run of an earlier version", "mkdir -p")
    assert not (old / "runs").exists()
    command = refused.stderr.partition("with: ")[2].partition(" (NAME")[0].replace("NAME", "mine")
    subprocess.run(command, shell=True, check=True)
    answer = nanochat(old, "chat", "-p", "Where does Tilda live?", "--max-tokens", "3")
    assert answer.returncode == 0 and "nanochat:" in answer.stdout, answer.stderr
