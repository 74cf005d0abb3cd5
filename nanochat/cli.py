"""The command line: `nanochat <command> [options]`, each command a frozen dataclass made into options by tyro."""

import contextlib
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from nanochat.console import console, say
from nanochat.errors import UserError
from nanochat.paths import base_paths
from nanochat.presets import PRESETS, PresetOptions, with_preset
from nanochat_kernels import KernelRequestError


@dataclass(frozen=True)
class Command:
    """A command's configuration and what runs it; both are imported only when the command is called."""

    load: Callable[[], tuple[type, Callable[[Any], None]]]
    summary: str


def _speedrun():
    from nanochat.chat.demo import show_conversation
    from nanochat.pipeline import NAMES, SpeedrunConfig, run_speedrun

    def run(config) -> None:
        paths = base_paths()
        run_speedrun(config, paths)
        if config.last == NAMES[-1]:
            show_conversation(paths, config.preset or "cpu", config.device)

    return SpeedrunConfig, run


def _tokenizer_train():
    from nanochat.train.tokenizer import TokenizerConfig, train_tokenizer

    return TokenizerConfig, _stage(lambda config: "tokenizer", train_tokenizer)


def _tokenizer_eval():
    from nanochat.evaluate.tokenizer import TokenizerEvalConfig, evaluate_tokenizer

    return TokenizerEvalConfig, _stage(lambda config: "tokenizer-eval", lambda config, paths: evaluate_tokenizer(paths))


def _train_base():
    from nanochat.train.base import BaseConfig, train_base

    return BaseConfig, _stage(lambda config: "base", train_base, device=lambda config: config.run.device)


def _train_mid():
    from nanochat.train.mid import MidConfig, train_mid

    return MidConfig, _stage(lambda config: "mid", train_mid, device=lambda config: config.run.device)


def _train_sft():
    from nanochat.train.sft import SftConfig, train_sft

    return SftConfig, _stage(lambda config: "sft", train_sft, device=lambda config: config.run.device)


def _evaluate_base():
    from nanochat.evaluate.commands import EvaluateBaseConfig, run_evaluate_base

    run = _stage(lambda config: "base-eval", run_evaluate_base, device=lambda config: config.device)
    return EvaluateBaseConfig, run


def _evaluate_chat():
    from nanochat.evaluate.commands import EvaluateChatConfig, run_evaluate_chat

    run = _stage(lambda config: f"{config.stage}-eval", run_evaluate_chat, device=lambda config: config.device)
    return EvaluateChatConfig, run


def _chat():
    from nanochat.chat.terminal import ChatConfig, run_chat

    return ChatConfig, lambda config: run_chat(config, base_paths())


def _report():
    from nanochat.report.build import ReportConfig, build_report

    return ReportConfig, lambda config: build_report(config, base_paths())


def _trace():
    from nanochat.trace import TraceConfig, run_trace

    return TraceConfig, run_trace


def _data_generate():
    from nanochat.data.generate import GenerateConfig, generate

    return GenerateConfig, _stage(lambda config: "data", generate)


def _kernels_list():
    from nanochat.kernel_commands import KernelsListConfig, list_kernels

    return KernelsListConfig, list_kernels


def _kernels_inspect():
    from nanochat.kernel_commands import KernelsInspectConfig, inspect_kernels

    return KernelsInspectConfig, inspect_kernels


def _kernels_tune():
    from nanochat.kernel_commands import KernelsTuneConfig, tune_kernels

    return KernelsTuneConfig, tune_kernels


def _kernels_gate():
    from nanochat.kernel_commands import KernelsGateConfig, run_gate

    return KernelsGateConfig, lambda config: run_gate(config, base_paths())


def _fetch():
    from nanochat.fetch import FetchConfig, fetch

    return FetchConfig, lambda config: fetch(config, base_paths())


def _preflight():
    from nanochat.preflight import PreflightConfig, preflight

    return PreflightConfig, lambda config: preflight(config, base_paths())


def _cluster_submit():
    from nanochat.cluster_commands import SubmitConfig, submit

    return SubmitConfig, submit


def _cluster_status():
    from nanochat.cluster_commands import StatusConfig, status

    return StatusConfig, lambda config: status(config, base_paths())


COMMANDS = {
    "speedrun": Command(_speedrun, "run every stage, from text to chat"),
    "fetch": Command(_fetch, "fetch the data of a preset, where there is internet"),
    "preflight": Command(_preflight, "check data, GPUs, disk and time before a run"),
    "data generate": Command(_data_generate, "make the embedded data"),
    "tokenizer train": Command(_tokenizer_train, "train the tokenizer"),
    "tokenizer eval": Command(_tokenizer_eval, "bytes per token on several kinds of text"),
    "train base": Command(_train_base, "pretrain on text"),
    "train mid": Command(_train_mid, "midtrain on conversations, tools and choices"),
    "train sft": Command(_train_sft, "fine-tune on conversations"),
    "evaluate base": Command(_evaluate_base, "bits per byte and CORE"),
    "evaluate chat": Command(_evaluate_chat, "multiple choice, word problems, code, spelling"),
    "chat": Command(_chat, "talk with the model"),
    "report": Command(_report, "write the report of what has run"),
    "trace": Command(_trace, "show the tensors of a forward pass"),
    "kernels list": Command(_kernels_list, "operations, implementations, and what auto takes here"),
    "kernels inspect": Command(_kernels_inspect, "compile every kernel for an architecture and check it"),
    "kernels gate": Command(_kernels_gate, "validate and time the operations on the device that trains"),
    "cluster submit": Command(_cluster_submit, "submit a job to Slurm"),
    "cluster status": Command(_cluster_status, "how far the run is"),
    "kernels tune": Command(_kernels_tune, "search launch parameters on the GPU here and write its table"),
}


def _stage(name: Callable[[Any], str], work: Callable, device: Callable[[Any], str] | None = None) -> Callable:
    """A command that tells the report its settings and results; with `device`, one that torchrun may start many of."""

    def run(config) -> None:
        from nanochat.report.sections import write_section

        started = time.perf_counter()
        paths = base_paths()
        if device is None:
            results, primary, processes = work(config, paths), True, 1
        else:
            from nanochat.runtime import start_runtime

            with start_runtime(device(config)) as runtime:
                results = work(config, paths, runtime)
                primary, processes = runtime.primary, runtime.world_size
        if primary:
            seconds = max(time.perf_counter() - started, results.get("train_seconds", 0.0))
            write_section(paths, name(config), asdict(config), results, seconds, processes)

    return run


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors a user can mend are one line on stderr and a non-zero exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _dispatch(arguments)
    except UserError as error:
        _fail(str(error), error.exit_status)
    except KernelRequestError as error:
        _fail(f"{error} (options --impl.<operation>)", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os._exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}; free space or mend the path", 1)


def _dispatch(arguments: list[str]) -> None:
    words = [word for word in arguments[:2] if not word.startswith("-")]
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    if name is None:
        if not words:
            _overview()
            if not arguments or arguments[0] not in ("-h", "--help"):
                raise UserError(f"wanted a command{f', got {arguments[0]}' if arguments else ''}")
            return
        if len(words) == 1 and any(command.startswith(f"{words[0]} ") for command in COMMANDS):
            of_it = [command for command in COMMANDS if command.startswith(f"{words[0]} ")]
            if "--help" in arguments or "-h" in arguments:
                return _overview(of_it)
            raise UserError(f"wanted one of: {', '.join(of_it)}")
        near = difflib.get_close_matches(" ".join(words), COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"there are: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {' '.join(words)!r}; {hint}")
    kind, run = COMMANDS[name].load()
    run(parse(kind, name, arguments[len(name.split()) :]))


def parse(kind: type, name: str, arguments: list[str]):
    """The configuration that a command's arguments give, over the preset's values, over the defaults."""
    default = kind()
    if isinstance(default, PresetOptions):
        preset = _option(arguments, "--preset")
        if preset is not None and preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; there are: {', '.join(PRESETS)}")
        default = with_preset(default, name, preset or "")
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(kind, args=arguments, default=default, prog=f"nanochat {name}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            return tyro.cli(kind, args=arguments, default=default, prog=f"nanochat {name}")
    except SystemExit as exit:
        # tyro draws a box; its words fit a line
        text = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue())
        text = " ".join(re.sub(r"\s|[─-╿]|-{3,}", " ", text).split())
        error = UserError(f"{text or 'bad options'} (nanochat {name} --help lists the options)")
        error.exit_status = exit.code if isinstance(exit.code, int) else 2
        raise error from None


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


def _fail(message: str, status: int) -> None:
    sys.stdout.flush()
    print(f"nanochat: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    # torchrun's other processes may wait in a collective: leave at once, without their farewell
    os._exit(status) if "torch" in sys.modules and _distributed() else sys.exit(status)


def _distributed() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()
