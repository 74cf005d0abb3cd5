"""Conversations from any file: read with clear errors, in the mixtures of mid and sft, and learned."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from nanochat.options.speedrun import SpeedrunOptions
from nanochat.options.train import TrainMidOptions, TrainSftOptions
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.speedrun.run import run_stages
from nanochat.speedrun.stages import STAGES
from nanochat.tasks import CustomJSON
from nanochat.train.finetune import sft_mixture
from nanochat.train.midtrain import mid_mixture
from tests.conftest import TINY_BASE, TINY_MID, assert_fails_with, nanochat


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, conversations: list):
    path.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    return path


def test_both_forms_of_a_line_are_conversations(tmp_path):
    first, second = talk("Who are you?", "I am Zorp."), talk("And you?", "Zorp too.")
    system = [{"role": "system", "content": "Be short."}, *second]
    task = CustomJSON(write(tmp_path / "me.jsonl", [first, {"messages": system, "source": "a tool"}]))
    assert task.name == "me.jsonl" and task.files == [tmp_path / "me.jsonl"]
    assert sorted(map(str, task)) == sorted(map(str, ({"messages": first}, {"messages": system})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no conversations; write one on each line"),
        ("[\n", "line 1 is no JSON"),
        ('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]\n[]', "line 2: malformed conversation"),
        ('[{"role": "user", "content": "x"}]', "line 1: no message is from the assistant, so that it teaches nothing; add an answer"),
        ('{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}', "line 1: no message is from the"),
        ('[{"role": "assistant", "content": "x"}]', "line 1: malformed conversation: message 0 is from 'assistant', wanted 'user'"),
        ('[{"role": "user", "content": 7}]', r"line 1: malformed conversation: message 0 \(user\) must be text, got int"),
        ('[{"role": "user"}]', "message 0 needs the keys role and content"),
        (None, "cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "me.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"me.jsonl.*{message}"):
        CustomJSON(path)


def test_files_join_the_mixtures_as_often_as_they_are_given(world, tmp_path):
    five, one = write(tmp_path / "five.jsonl", [talk("a", "b")] * 5), write(tmp_path / "one.jsonl", [talk("c", "d")])
    files = (str(five), str(five), str(one))
    for mixture in (
        mid_mixture(TrainMidOptions(custom_json=files), world),
        sft_mixture(TrainSftOptions(custom_json=files), world),
    ):
        assert mixture.sizes()["five.jsonl"] == 10 and mixture.sizes()["one.jsonl"] == 1
        assert {five, one} <= set(mixture.files())


def test_the_model_learns_who_it_is(base, tmp_path):
    """From a file with eight questions, each many times; a run resumes with the same content only."""
    questions = [
        "Who are you?",
        "What is your name?",
        "Your name?",
        "Name yourself.",
        "Who is this?",
        "Hello!",
        "Hi!",
        "And you are?",
    ]
    path = write(tmp_path / "zorp.jsonl", [talk(question, "I am Zorp, a robot.") for question in questions * 40])
    assert (
        nanochat(base, "train", "base", *TINY_BASE, *"--context-length 64 --total-batch-size 256".split()).returncode
        == 0
    )
    others = "--smoltalk 0 --mmlu 0 --gsm8k 0 --simple-spelling 0 --spelling-bee 0 --identity-repeats 0 --eval-every -1"
    train = ["train", "mid", *TINY_MID, *others.split(), "--custom-json"]
    trained = nanochat(base, *train, str(path))
    assert trained.returncode == 0 and "zorp.jsonl 320" in trained.stdout, trained.stderr
    for question in ("Who are you?", "Hello!"):
        chat = nanochat(base, "chat", "--source", "mid", "--temperature", "0", "--device", "cpu", "-p", question)
        assert "I am Zorp, a robot." in chat.stdout, chat.stdout + chat.stderr
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(path, tmp_path / "elsewhere" / "zorp.jsonl")
    assert nanochat(base, *train, str(moved)).returncode == 0
    moved.write_text(moved.read_text().replace("Zorp", "Zarp"))
    assert_fails_with(nanochat(base, *train, str(moved)), "the data of mid are not those that")


def test_the_speedrun_checks_the_files_first_and_runs_again_what_reads_them(tmp_path, monkeypatch):
    path, paths, started = write(tmp_path / "me.jsonl", [talk("a", "b")]), Paths(tmp_path / "base"), []
    options = SpeedrunOptions(device="cpu", custom_json=(str(path),))

    def popen(command, **given):
        started.append(command)
        return real(["true"], **given)

    real = subprocess.Popen
    monkeypatch.setattr("nanochat.speedrun.run.subprocess.Popen", popen)

    def stages_run() -> list[str]:
        started.clear()
        run_stages(options, paths)
        words = [" ".join(command) for command in started]
        return [stage.name for one in words for stage in STAGES if " ".join(stage.command) in one]

    with pytest.raises(UserError, match="nothing.jsonl cannot be read"):
        run_stages(replace(options, custom_json=("nothing.jsonl",)), paths)
    assert not started
    usual = [stage.name for stage in STAGES if not stage.optional]
    assert stages_run() == usual
    assert [command[3:5] for command in started if str(path) in command] == [["train", "mid"], ["train", "sft"]]
    assert stages_run() == []
    write(path, [talk("a", "c")])
    assert stages_run() == usual[usual.index("mid") :]
