"""`nanochat kernels list`, `inspect`, `tune` and `gate`: lists operations, checks the compiled code, searches launch parameters,
and validates and times the operations."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich.table import Table

from nanochat.gate import choose_implementations, run_shape, with_choices
from nanochat.gpt import GPTConfig
from nanochat.options.model import Implementations
from nanochat.options.presets import with_preset
from nanochat.options.tools import KernelsGateOptions, KernelsInspectOptions, KernelsListOptions, KernelsTuneOptions
from nanochat.options.train import TrainBaseOptions
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import Runtime, start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.speedrun.preflight import most_rows
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.train.micro_step import step_on_meta
from nanochat.train.timing import time_executions
from nanochat_kernels import architecture, configs, dispatch, gate, inspect, library, tune, tune_run

TUNE_SECONDS = 240.0  # of the gate's ten minutes


def list_kernels(options: KernelsListOptions) -> None:
    """Print every operation with its implementations, and the one that "auto" takes on this machine."""
    table = Table("operation", "implementations", "auto takes", "because", box=None)
    for name, operation in sorted(dispatch.operations().items()):
        chosen, reason = dispatch.describe(operation)
        table.add_row(name, ", ".join((*operation.implementations, "reference")), chosen, reason)
    show_table(table)


def inspect_kernels(options: KernelsInspectOptions) -> None:
    """Compile every launch for an architecture and print what the compiler made of it. Raises UserError for defects."""
    _check_names(options.kernel)
    with _reported_to_the_user():
        launches = list(inspect.inspect_all(options.arch, options.kernel))
    table = Table(box=None)
    for name in ("kernel", "flags", "dtype", "shape", "constants"):
        table.add_column(name)
    for name in ("registers", "spilled B", "shared B"):
        table.add_column(name, justify="right")
    table.add_column("matrix and copy instructions")
    table.add_column("defects")
    for launch in launches:
        constants = " ".join(f"{key}={int(value)}" for key, value in launch.constants.items())
        numbers = (str(launch.registers), str(launch.spilled), str(launch.shared))
        words = (launch.kernel, launch.flags, launch.dtype, launch.key, constants)
        table.add_row(*words, *numbers, _join(launch.instructions), _join(launch.defects))
    show_table(table)
    defective = [launch for launch in launches if launch.defects]
    if defective:
        first = defective[0]
        raise UserError(
            f"{len(defective)} of {len(launches)} launches for {options.arch} have defects, the first is {first.kernel} "
            f"({first.flags}) {first.dtype} {first.key}: {_join(first.defects)}; "
            f"change kernels/configs/{options.arch}.json, or tune again"
        )
    say(f"{len(launches)} launches compile for {options.arch} without a defect")


def _check_names(names: tuple[str, ...]) -> None:
    """Raise UserError for the name of a kernel that does not exist."""
    known = [kernel.name for kernel in dispatch.tunable_kernels()]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"no kernel is called {', '.join(unknown)}; there are {', '.join(known)}")


@contextmanager
def _reported_to_the_user() -> Iterator[None]:
    """Turn errors that are raised for the user into UserError; every other error is a bug and keeps its traceback."""
    try:
        yield
    except (inspect.CannotRun, configs.LaunchTableError) as error:
        raise UserError(str(error)) from error


def tune_kernels(options: KernelsTuneOptions) -> None:
    """Time the launch parameters of the kernels on this GPU and write the fastest to its table. Raises UserError without one."""
    _check_names(options.kernel)
    with _reported_to_the_user():
        if options.arch == "sm80" and architecture.TRITON_INSTALLED:
            architecture.run_ptx_of("sm80")
        for kernel, milliseconds, parameters in tune.tune(options.kernel, say):
            say(f"{kernel}: {milliseconds:.4f} ms with {parameters}")


def run_gate(options: KernelsGateOptions, paths: Paths) -> None:
    """Validate and time every operation at the shapes of a preset, and write the choices to gate.json.

    Raises UserError when the comparisons do not fit into the memory, and without a GPU unless --device cpu asks for it.
    """
    base = with_preset(TrainBaseOptions(), "train base", options.preset)
    vocabulary = options.vocab_size or (
        Tokenizer.load(paths.tokenizer, paths.make_tokenizer).vocab_size if paths.tokenizer.exists() else 65536
    )
    model = GPTConfig.from_depth(
        options.depth or base.depth, vocabulary, options.context_length or base.context_length,
        options.n_kv_head or base.n_kv_head,
    )  # fmt: skip
    with start_runtime(options.device) as runtime:
        if options.device == "auto" and runtime.device.type == "cpu":
            raise UserError(
                "there is no GPU here, and the gate has to be measured where training will run; on a cluster: nanochat cluster "
                "submit gate; to measure on this CPU: --device cpu"
            )
        shape = run_shape(model, options.device_batch_size or most_rows(options.preset, model, runtime))
        more, operations, count = {}, {}, len(dispatch.operations())
        configs.take_parameters({})
        if options.tune and runtime.device.type == "cuda":
            try:
                more["tuned"] = tune_for_run(model, shape.rows, runtime)
            except RuntimeError as error:  # after some errors CUDA works no more in this process
                raise UserError(
                    f"the search of launch parameters failed ({str(error).splitlines()[0]}); without it: --no-tune"
                ) from error
        try:
            for name, choice in examined(shape, runtime, more.get("tuned", {})):
                operations[name] = choice
                say(f"[{len(operations)}/{count}] {name}: {choice['impl']} ({choice['why']})")
        except gate.GateError as error:
            raise UserError(str(error)) from error
        if runtime.device.type == "cuda":  # only CUDA has a choice of executions
            alone = {name: choice["impl"] for name, choice in operations.items()}
            more["micro_step"] = choose_by_micro_step(operations, model, shape.rows, runtime)
            times = more["micro_step"]["ms"]
            why = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
            say(f"micro-step: {min(times, key=times.__getitem__, default='graph')} ({why})")
            for name, choice in operations.items():
                if choice["impl"] != alone[name]:
                    say(f"{name}: {choice['impl']}, because the micro-step is faster with it")
        gate.write(paths.gate, gate.identity(shape, runtime.device, runtime.compute_dtype), operations, **more)
    say(
        f"wrote {paths.gate}; training of the run {paths.run_name} on this device and at these shapes takes it from now on"
    )


def examined(shape: gate.RunShape, runtime: Runtime, tuned: dict[str, dict]) -> Iterator[tuple[str, dict[str, Any]]]:
    """gate.examine; where kernels are wrong with what was searched and right with the launch table, `tuned` loses them."""
    where = shape, runtime.device, runtime.compute_dtype
    for name, choice in gate.examine(*where):
        operation = dispatch.operations()[name]
        own = {kernel.name for kernel in operation.kernels}
        if {"triton", "fused"} & choice["faults"].keys() and any(own & launch.keys() for launch in tuned.values()):
            kept = {
                architecture: {k: v for k, v in launch.items() if k not in own}
                for architecture, launch in tuned.items()
            }
            configs.take_parameters(kept)
            again = gate.examine_operation(operation, *where)
            if again["faults"].keys() < choice["faults"].keys():
                say(f"{name}: with the launch table's parameters, for with those that were searched it is wrong")
                choice = again
                tuned |= kept
            else:
                configs.take_parameters(dict(tuned))
        yield name, choice


def tune_for_run(model: GPTConfig, rows: int, runtime: Runtime) -> dict[str, dict]:
    """Search launch parameters for the kernels of a training step where the table's are of another GPU model, and use them.

    Returns them by architecture, as gate.json keeps them.
    """
    if library.in_use():
        say("launch parameters: those of the library, which has no code for others")
        return {}
    step = partial(step_on_meta, dtype=runtime.compute_dtype, rows=rows, length=model.context_length)
    block = replace(model, depth=1)  # a block shows which kernels the other implementations have
    others = [
        replace(block, impl=replace(block.impl, **{name: impl}))
        for name in vars(model.impl)
        for impl in dispatch.operations()[Implementations.operations(name)[0]].implementations
    ]
    say(f"launch parameters: searching for up to {TUNE_SECONDS:.0f} s where the launch table is of another GPU model")
    found = tune_run.search([partial(step, config) for config in (model, *others)], TUNE_SECONDS, say)
    for line in found.left:
        say(f"not tuned: {line}")
    count = sum(len(classes) for dtypes in found.launch.values() for classes in dtypes.values())
    say(f"launch parameters: {count} searched, {len(found.left)} left as in the launch table")
    tuned = {found.architecture: found.launch} if count else {}
    configs.take_parameters(tuned)
    return tuned


def choose_by_micro_step(operations: dict[str, dict], model: GPTConfig, rows: int, runtime: Runtime) -> dict:
    """Time a micro-step in a graph with every fused operation that is right, and compiled with the fastest of each; the faster one's
    implementations become the choice. Returns what gate.json keeps of it: implementations, and milliseconds by execution.

    On its own an operation is compared with its compiled reference; in a graph the reference would run uncompiled.
    """
    in_model = {name for name in vars(model.impl) if name != "optimizer"}
    executed = {operation for name in in_model for operation in Implementations.operations(name)}
    fused = {
        name: choice | {"impl": gate.fastest_fused(choice)} if name in executed else choice
        for name, choice in operations.items()
    }
    models = {
        execution: with_choices(model, choose_implementations(choices))
        for execution, choices in (("graph", fused), ("compile", operations))
    }
    times = time_executions(models, rows, runtime.device, runtime.compute_dtype)
    winner = min(times, key=times.__getitem__, default="graph")
    if winner == "graph":
        for name, choice in operations.items():
            choice["impl"] = fused[name]["impl"]
    return {"impl": asdict(models[winner].impl), "ms": times}


def _join(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"
