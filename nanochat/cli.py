"""The command line: `nanochat <command> [options]`.

The options of a command are a class in nanochat/options. Its code is imported only when it runs, so that help and errors do
not wait for torch.
"""

import atexit
import contextlib
import difflib
import inspect
import io
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, NoReturn

import tyro

from nanochat import __version__
from nanochat.options.evaluate import NOT_REPORTED
from nanochat.options.presets import PRESETS, NamedRun, NewestRun, PresetOptions, with_preset
from nanochat.options.ranges import check_ranges
from nanochat.platform.console import console, output, say
from nanochat.platform.errors import NO_SPACE, UserError, is_out_of_memory, remedy_for
from nanochat.platform.lock import locked
from nanochat.platform.paths import DEFAULT_RUN, Paths, base_paths


@dataclass(frozen=True)
class Command:
    """A command: its options and its function, each as "module:name" under nanochat, and a one-line summary.

    The function takes the options, and `paths` and `runtime` if it has parameters of these names; with a runtime, torchrun may
    start several processes of the command. section: the name of the report's section for the settings and for the results that
    the function returns; {stage} in it stands for the option. only_reads: it writes nothing but this section, and works without it
    where the base directory cannot be written to.
    """

    options: str
    function: str
    summary: str
    section: str = ""
    only_reads: bool = False

    def load_options(self) -> type:
        return _load(f"options.{self.options}")

    def load_function(self) -> Callable[..., Any]:
        return _load(self.function)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"nanochat.{module}"), attribute)


COMMANDS = {
    "speedrun": Command("speedrun:SpeedrunOptions", "speedrun.run:speedrun", "run every stage, from text to chat"),
    "fetch": Command("speedrun:FetchOptions", "speedrun.fetch:fetch", "download the data of a preset; needs internet"),
    "preflight": Command(
        "speedrun:PreflightOptions", "speedrun.preflight:preflight", "check data, GPUs, disk and time before a run"
    ),
    "data generate": Command(
        "data:GenerateOptions", "synthetic.generate:generate", "generate the embedded data", section="data"
    ),
    "tokenizer train": Command(
        "tokenizer:TokenizerTrainOptions",
        "tokenizer.training:train_tokenizer",
        "train the tokenizer",
        section="tokenizer",
    ),
    "tokenizer eval": Command(
        "tokenizer:TokenizerEvalOptions",
        "evaluate.compression:evaluate_tokenizer",
        "measure bytes per token on several kinds of text",
        section="tokenizer-eval",
        only_reads=True,
    ),
    "train base": Command("train:TrainBaseOptions", "train.pretrain:pretrain", "pretrain on text", section="base"),
    "train mid": Command(
        "train:TrainMidOptions",
        "train.midtrain:midtrain",
        "midtrain on conversations, tools and multiple choice",
        section="mid",
    ),
    "train sft": Command(
        "train:TrainSftOptions", "train.finetune:finetune", "fine-tune on conversations", section="sft"
    ),
    "train rl": Command(
        "train:TrainRlOptions", "train.reinforce:reinforce", "train on word problems by their rewards", section="rl"
    ),
    "evaluate base": Command(
        "evaluate:EvaluateBaseOptions",
        "evaluate.base:evaluate_base",
        "measure bits per byte and CORE",
        section="{stage}-eval",
        only_reads=True,
    ),
    "evaluate chat": Command(
        "evaluate:EvaluateChatOptions",
        "evaluate.chat:evaluate_chat",
        "evaluate multiple choice, word problems, code, spelling",
        section="{stage}-eval",
        only_reads=True,
    ),
    "chat": Command("chat:ChatOptions", "chat.terminal:chat", "chat with the model", only_reads=True),
    "export": Command(
        "exchange:ExportOptions",
        "huggingface.exchange:export_model",
        "write a model for the transformers library",
        only_reads=True,
    ),
    "import": Command(
        "exchange:ImportOptions",
        "huggingface.exchange:import_model",
        "read a NanoChat model of the transformers library",
    ),
    "web": Command("chat:WebOptions", "chat.web:web", "chat in the browser, and OpenAI's API", only_reads=True),
    "report": Command(
        "report:ReportOptions", "report.build:build_report", "write the report of the stages that have run"
    ),
    "trace": Command("tools:TraceOptions", "tools.trace:trace", "show the tensors of a forward pass", only_reads=True),
    "kernels list": Command(
        "tools:KernelsListOptions",
        "tools.kernels:list_kernels",
        "list operations, implementations, and the choice of auto on this machine",
    ),
    "kernels inspect": Command(
        "tools:KernelsInspectOptions",
        "tools.kernels:inspect_kernels",
        "compile every kernel for an architecture and check it",
    ),
    "kernels gate": Command(
        "tools:KernelsGateOptions",
        "tools.kernels:run_gate",
        "validate and time the operations on the device that trains",
    ),
    "kernels tune": Command(
        "tools:KernelsTuneOptions",
        "tools.kernels:tune_kernels",
        "search launch parameters on this GPU and write its table",
    ),
    "cluster submit": Command("cluster:SubmitOptions", "cluster.submit:submit", "submit a job to Slurm"),
    "cluster status": Command(
        "cluster:StatusOptions", "cluster.status:status", "show the progress of a run", only_reads=True
    ),
}


def run(name: str, options: Any) -> None:
    """Call a command's function with the arguments that it takes, and write its section of the report.

    A command with a section holds a lock of that name: two of its kind would write the same files.
    """
    command = COMMANDS[name]
    function = command.load_function()
    parameters = inspect.signature(function).parameters
    section = command.section.format(stage=getattr(options, "stage", ""))
    paths = _paths(options, command.only_reads) if "paths" in parameters or section else None
    arguments = {"paths": paths} if "paths" in parameters else {}
    started = time.perf_counter()
    with _runtime(options) if "runtime" in parameters else contextlib.nullcontext() as runtime:
        if runtime is not None:
            arguments["runtime"] = runtime
        if not section:
            return function(options, **arguments)
        primary = runtime is None or runtime.primary
        writes = primary and (paths.writable or not command.only_reads)
        with output.may_fail(), locked(paths.lock(section), name) if writes else contextlib.nullcontext():
            if runtime is not None:
                runtime.barrier()  # no process reads what the holder of the lock may still be writing
            results = function(options, **arguments)
            if primary and not writes:
                say(f"note {paths.run} cannot be written to: the report will not have these results")
            if primary and (reason := results.get(NOT_REPORTED)):
                say(f"note the report keeps the results that it has: {reason}")
            elif writes:
                from nanochat.report.sections import write_section

                seconds = time.perf_counter() - started + results.get("earlier_seconds", 0.0)
                processes = 1 if runtime is None else runtime.world_size
                write_section(paths, section, asdict(options), results, seconds, processes)


def _runtime(options: Any) -> contextlib.AbstractContextManager:
    from nanochat.platform.distributed import start_runtime

    return start_runtime(options.device)


def _paths(options: Any, only_reads: bool) -> Paths:
    """The paths of the run that the options name."""
    paths = base_paths(only_reads)
    if not isinstance(options, NamedRun):
        return paths
    newest = paths.runs[-1:] if isinstance(options, NewestRun) else []
    return paths.of_run(options.run_name or getattr(options, "preset", "") or (newest or [DEFAULT_RUN])[0])


def main(arguments: list[str] | None = None) -> None:
    """Run a command. An error that the user can fix is one line on stderr and a non-zero exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _dispatch(arguments)
        if _distributed():
            _leave()
    except UserError as error:
        _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os._exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        path = f": {error.filename}" if error.filename else ""
        remedy = f"; {remedy_for(error)}" if path or error.errno in NO_SPACE else ""
        _fail(f"{error.strerror}{path}{remedy}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "the system gives no more"
        _fail(f"not enough memory ({reason}); take fewer rows at a time, shorter ones, or a smaller model", 1)
    except ValueError as error:
        kernels = sys.modules.get("nanochat_kernels")  # code that raises one of its errors has imported it
        if kernels is None or not isinstance(error, kernels.KernelRequestError):
            raise
        _fail(f"{error} (options --impl.<operation>)", 1)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        return say(f"nanochat {__version__}")
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    words = [word for word in arguments[:2] if not word.startswith("-")]
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    if name is None:
        if not words:
            _overview()
            if not arguments or arguments[0] not in ("-h", "--help"):
                raise UserError(f"wanted a command{f', got {arguments[0]}' if arguments else ''}")
            return
        if len(words) == 1 and any(command.startswith(f"{words[0]} ") for command in COMMANDS):
            subcommands = [command for command in COMMANDS if command.startswith(f"{words[0]} ")]
            if "--help" in arguments or "-h" in arguments:
                return _overview(subcommands)
            raise UserError(f"wanted one of: {', '.join(subcommands)}")
        near = difflib.get_close_matches(" ".join(words), COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"there are: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {' '.join(words)!r}; {hint}")
    run(name, parse(COMMANDS[name].load_options(), name, arguments[len(name.split()) :]))


def parse(kind: type, name: str, arguments: list[str]):
    """The options of a command: its arguments override the preset's values, which override the defaults.

    Raises UserError for arguments that cannot be parsed or are out of range.
    """
    default = kind()
    if isinstance(default, PresetOptions):
        preset = _option(arguments, "--preset")
        if preset is not None and preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; there are: {', '.join(PRESETS)}")
        default = with_preset(default, name, preset or "")
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(kind, args=arguments, default=default, prog=f"nanochat {name}")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options = tyro.cli(kind, args=arguments, default=default, prog=f"nanochat {name}")
    except SystemExit as exit:
        error = UserError(f"{_message(output.getvalue())} (nanochat {name} --help lists the options)")
        error.exit_status = exit.code if isinstance(exit.code, int) else 2
        raise error from None
    check_ranges(options)
    return options


def _message(box: str) -> str:
    """What tyro says in a box whose parts are a title, the message, perhaps what was meant, and where help is."""
    parts = re.split(r"\n[^\n]*(?:[─-╿]|-){5,}[^\n]*", "\n" + re.sub(r"\x1b\[[0-9;]*m", "", box))
    texts = [" ".join(re.sub("[─-╿]", " ", part).split()) for part in parts]
    message = texts[1].removesuffix(".") if len(texts) > 1 else "bad options"
    meant = [re.search(r"--\S+", text) for text in texts[2:] if text.startswith("Perhaps you meant")]
    return message.replace("('', ", "(") + "".join(f"; did you mean {option[0]}?" for option in meant if option)


def _option(arguments: list[str], option: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _overview(names: list[str] | None = None) -> None:
    say("usage: nanochat <command> [options]; nanochat <command> --help explains its options\n")
    for name in names or COMMANDS:
        console.print(f"  [bold]{name:16}[/bold] {COMMANDS[name].summary}")


def _fail(message: str, status: int) -> NoReturn:
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"nanochat: error: {' '.join(message.split())}\n")):
        with contextlib.suppress(OSError):  # of a closed terminal, for example; the status remains
            print(text, end="", file=stream, flush=True)
    # the other processes may wait in a collective, and a regular exit would wait for them: exit at once
    if _distributed():
        os._exit(status)
    sys.exit(status)


def _leave() -> NoReturn:
    """End a process of a distributed run that has done its work, with status 0, whatever threads still run in gloo or NCCL.

    After a collective gloo's thread asks for the GIL, to release the tensor. If the interpreter is already being finalized by
    then, Python ends that thread, and this aborts the process.
    """
    atexit._run_exitfuncs()  # as a regular exit does: they remove temporary directories, for example
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _distributed() -> bool:
    """Whether torchrun has started this process and it has come as far as to import torch."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
