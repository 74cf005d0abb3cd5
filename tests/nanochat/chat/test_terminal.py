"""Chat in the terminal, and the evaluation of a model that chats."""

import json
import shutil
from pathlib import Path

import pytest

from nanochat.chat.terminal import chat, print_answer
from nanochat.inference.session import Text, ToolCall, ToolResult, shown
from nanochat.options.chat import ChatOptions
from nanochat.options.evaluate import EvaluateChatOptions
from nanochat.platform.paths import Paths
from tests import forked
from tests.conftest import TINY_EVALUATE_BASE, TINY_EVALUATE_CHAT, command, environment, nanochat


def test_a_tool_call_is_shown_with_its_result():
    assert "".join(shown([Text("It is"), ToolCall("2+3"), ToolResult("5"), Text(".")])) == "It is [2+3 → 5] ."
    assert "".join(shown([ToolCall("what"), Text("?")])) == " [what] ?"


def test_an_interrupted_answer_is_said_to_be_so(monkeypatch):
    """The chat goes on; with --prompt the command ends as one that was interrupted."""

    class Interrupted:
        def ask(self, text):
            yield Text("I am")
            raise KeyboardInterrupt

    class Whole:
        def ask(self, text):
            yield Text("I am here")

    assert print_answer(Whole(), "hi") and not print_answer(Interrupted(), "hi")
    monkeypatch.setattr("nanochat.chat.terminal.print_answer", lambda *_: False)
    monkeypatch.setattr("nanochat.chat.terminal.load_model", lambda *_: (None, None, None))
    monkeypatch.setattr("nanochat.chat.terminal.Engine", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        chat(ChatOptions(prompt="hi", device="cpu"), Paths(Path("nowhere")))


def test_chat_and_evaluation_of_a_trained_model(trained_base, tmp_path):
    base = shutil.copytree(trained_base, tmp_path / "base")
    result = nanochat(base, "chat", "-p", "Where does Tilda live?", "--max-tokens", "5")
    assert result.returncode == 0 and result.stdout.startswith("nanochat: "), result.stderr
    for prompt, problem in (("b" * 3000, "the message has"), ("", "the prompt is empty; give a text")):
        result = nanochat(base, "chat", "-p", prompt)
        assert result.returncode == 1 and not result.stdout and problem in result.stderr
    talk = forked.run(
        *command("chat", "--max-tokens", "4", "--source", "mid")[1:], env=environment(base),
        given="hello\n/clear\n/help\n/nonsense\nhi again\n/quit\nnever read\n",
    )  # fmt: skip
    assert talk.returncode == 0 and talk.stdout.count("nanochat: ") == 2 and "a new conversation" in talk.stdout
    assert (
        "there is no command /nonsense; /clear starts" in talk.stdout
        and talk.stdout.count("Ctrl-C ends an answer") == 2
    )

    # two processes share the items and find what one finds
    results = []
    for processes in (1, 2):
        for kind in ("chat", "base"):
            arguments = TINY_EVALUATE_CHAT if kind == "chat" else TINY_EVALUATE_BASE
            run = nanochat(base, "evaluate", kind, *arguments, processes=processes)
            assert run.returncode == 0, run.stderr
            section = json.loads(
                (
                    Paths(base).run / "report" / "sections" / f"{'sft' if kind == 'chat' else 'base'}-eval.json"
                ).read_text()
            )
            assert section["processes"] == processes
            results.append(section["results"])
    assert results[0] == results[2] and results[1] == pytest.approx(results[3], rel=1e-9)
    assert results[0].keys() == {"ARC-Easy", "SpellingBee", "samples"}
    assert [sample["you"] for sample in results[0]["samples"]] == list(EvaluateChatOptions().sample_prompts)
