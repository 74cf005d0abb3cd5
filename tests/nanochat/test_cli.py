"""The command line as a user meets it."""

import inspect
import subprocess
import sys

import pytest

from nanochat.cli import COMMANDS, main, parse
from tests.conftest import assert_fails_with, environment, nanochat


def test_help_lists_every_command():
    result = nanochat(None, "--help")
    assert result.returncode == 0
    for name, command in COMMANDS.items():
        assert name in result.stdout and command.summary in result.stdout


def test_chat_takes_the_stage_as_other_commands_do():
    """They call it --stage."""
    for arguments in (["--stage", "mid"], ["--stage=mid"], ["--source", "mid"]):
        assert parse(COMMANDS["chat"].load_options(), "chat", arguments).source == "mid"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_a_function_that_takes_what_it_can_be_given(name):
    function = COMMANDS[name].load_function()
    options, *given = inspect.signature(function).parameters
    assert options == "options" and set(given) <= {"paths", "runtime"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "base", "--help"],
        ["kernels", "--help"],
        ["trian"],
        ["chat", "--top-k", "0"],
        ["cluster", "status"],
        ["cluster", "submit", "--dry-run"],
    ],
    ids=" ".join,
)
def test_what_reads_no_model_needs_no_torch(arguments, tmp_path):
    """Torch takes seconds to import: what answers without it answers at once, also on a login node."""
    script = (
        f"import sys; from nanochat.cli import main\ntry: main({arguments})\nfinally: assert 'torch' not in sys.modules"
    )
    env = environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert "AssertionError" not in done.stderr and (done.stdout or "nanochat: error:" in done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset"], "Missing value for argument '--preset'. Expected 1 values"),
        (["--nope"], "Unrecognized options: --nope"),
        (["--run.execution", "eager"], "Unrecognized options: --run.execution, eager; did you mean --execution?"),
        (["--depth", "x"], "Error parsing --depth: invalid literal for int() with base 10: 'x'"),
        (["--execution", "fast"], "invalid choice 'fast' for argument '--execution'. Expected one of ('auto', 'graph',"),
        (["--seed", str(10**20)], "--seed must be an integer of 64 bits, got 100000000000000000000"),
        (["--save-every", str(-(2**64))], "--save-every must be"),
    ],
)  # fmt: skip
def test_an_error_of_the_options_is_said_once(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["train", "base", *arguments])
    said = capsys.readouterr().err
    assert said.startswith(f"nanochat: error: {message}") and len(said.splitlines()) == 1
    assert said.count("--help") <= 1 and "full helptext" not in said and said.lower().count("unrecognized options") <= 1


def test_help_is_a_command_too(capsys):
    main(["help"])
    assert "train base" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["help", "train", "base"])
    assert ended.value.code == 0 and "--device-batch-size" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["evaluate.chat", "evaluate.base", "chat.terminal", "inference.engine"])
def test_modules_that_do_not_train_import_nothing_slow(module):
    """torch._dynamo and torch.distributed.checkpoint took longer to import than torch itself. Making a model did it too."""
    slow = "'torch._dynamo', 'sympy', 'torch.distributed.checkpoint'"
    script = f"import sys, nanochat.{module}; print([name for name in ({slow}) if name in sys.modules]); "
    script += "from nanochat.gpt import GPT, GPTConfig; GPT.create(GPTConfig.from_depth(1, 8, 8)); "
    script += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\nFalse\n", done.stderr + done.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_explains_every_option_with_its_default(name):
    kind = COMMANDS[name].load_options()
    assert kind.__doc__.strip()
    with pytest.raises(SystemExit) as exit:
        parse(kind, name, ["--help"])
    assert exit.value.code == 0


def test_help_text_has_defaults_and_units(capsys):
    kind = COMMANDS["train base"].load_options()
    with pytest.raises(SystemExit):
        parse(kind, "train base", ["--preset", "cpu", "--help"])
    text = capsys.readouterr().out
    for part in (
        "--total-batch-size",
        "tokens per step",
        "4096",
        "--save-every",
        "steps between checkpoints",
        "--impl.attention",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ("wanted a command",)),
        (["trian"], ("unknown command 'trian'", "did you mean")),
        (["train"], ("wanted one of: train base, train mid, train sft",)),
        (["train", "bass"], ("unknown command 'train bass'", "train base")),
        (["chat", "--tempreature", "1"], ("tempreature",)),
        (["train", "base", "--depth", "deep"], ("depth", "deep")),
        (["train", "base", "--depth", "0"], ("--depth must be between 1 and 1000, got 0",)),
        (["train", "base", "--warmdown-ratio", "2"], ("--warmdown-ratio must be between 0 and 1, got 2",)),
        (["train", "base", "--target-flops", "inf"], ("--target-flops must be a finite number, got inf",)),
        (["train", "base", "--matrix-lr", "nan"], ("--matrix-lr must be a finite number, got nan",)),
        (["train", "base", "--keep-checkpoints", "0"], ("--keep-checkpoints must be at least 1, got 0",)),
        (["train", "base", "--preset", "d21"], ("unknown preset 'd21'", "tiny, cpu, gpu, d20, d26, d32")),
        (["evaluate", "chat", "--rows", "-1"], ("--rows must be between 1 and 1000000, got -1",)),
        (
            ["evaluate", "chat", "--max-per-task", "0"],
            ("--max-per-task must be at least 1, or negative for all, got 0",),
        ),
        (
            ["evaluate", "base", "--core-max-per-task", "0"],
            ("--core-max-per-task must be at least 1, or negative for all",),
        ),
        (["train", "base", "--core-metric-max-per-task", "0"], ("must be at least 1, or negative for all, got 0",)),
        (["speedrun", "--from", "nowhere"], ("nowhere", "no such stage", "tokenizer")),
        (["speedrun", "--from", "sft", "--to", "base"], ("comes after",)),
        (["speedrun", "--preset", "d20"], ("of 241 shards of FineWeb-Edu 241 are missing", "nanochat fetch")),
        (["chat", "-p", "hi"], ("no checkpoint of sft", "nanochat train sft")),
        (["evaluate", "base"], ("no checkpoint of base", "nanochat train base")),
        (["train", "mid"], ("no checkpoint of base",)),
        (["report"], ("nothing to report", "nanochat speedrun")),
        (["evaluate", "chat", "--tasks", "Nothing"], ("unknown task 'Nothing'", "ARC-Easy")),
        (["train", "base"], ("no tokenizer", "nanochat tokenizer train")),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, arguments, parts):
    assert_fails_with(nanochat(tmp_path, *arguments), *parts)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/a"), "No space left on device: /a; free some space"),
        (PermissionError(13, "Permission denied", "/a"), "Permission denied: /a; check the path and its permissions"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
    ],
)
def test_an_error_of_the_operating_system_is_one_line_with_a_remedy_that_fits(monkeypatch, capsys, error, line):
    monkeypatch.setattr("nanochat.cli._dispatch", lambda arguments: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == f"nanochat: error: {line}\n"
