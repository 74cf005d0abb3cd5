"""The plan of a training stage: its batches, steps, learning rate and evaluations."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import NamedTuple

from nanochat.checkpoint import CheckpointStore
from nanochat.data.batches import Batch
from nanochat.gate import check_gate_rows, gate_rows, take_gate
from nanochat.gpt import GPTConfig
from nanochat.options.presets import with_preset
from nanochat.options.train import TrainBaseOptions, TrainOptions
from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.platform.shapes import check_shape
from nanochat.train.memory import MOST_ROWS, rows_that_fit
from nanochat.train.schedules import muon_momentum

# options of evaluations, which change nothing that is learned
MEASUREMENTS = (
    "eval_every",
    "eval_rows",
    "eval_tokens",
    "eval_examples",
    "eval_samples",
    "chat_metric_every",
    "chat_metric_max_per_task",
)
# the values that earlier versions, which did not have these options, always trained with
EARLIER_VALUES = {
    "num_epochs": 1,
    "num_iterations": -1,
    "warmup_ratio": 0.0,
    "final_lr_fraction": 0.0,
    "init_lr_fraction": 1.0,
    "source": "mid",
}


@dataclass(frozen=True)
class Evaluation:
    """A measurement after every `every` steps and at the end. 0: only at the end; negative: never."""

    every: int
    measure: Callable[[], dict]
    first: bool = False  # also before the first step

    def due(self, step: int, last: bool) -> bool:
        """Whether to measure at the boundary before step `step`; last: no step follows."""
        if self.every < 0:
            return False
        return last or (self.first if step == 0 else self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class Plan:
    """Everything in which one training stage differs from another."""

    stage: str
    batches: Callable[[list | None], Iterator[Batch]]  # from the saved positions of all ranks; None: from the beginning
    rows: int  # of a micro-batch
    accumulation: int  # micro-batches per step on each rank
    lr_multiplier: Callable[[float], float]  # a function of the progress, 0 to 1
    steps: int | None  # None: until the data ends
    momentum: Callable[[int], float] = muon_momentum  # of Muon, a function of the step
    one_length: bool = True  # the rows of all batches have the same length
    ahead: bool = True  # a thread may prepare batches before their step; not if they come from the model as it is
    # further metrics of the newest step, over all ranks, each of which calls it
    measured: Callable[[], dict[str, float]] = dict
    evaluations: list[Evaluation] = field(default_factory=list)
    cache_bytes: int = 0  # of keys and values, where the model generates what it is trained on


def accumulation_steps(total_batch: int, rows: int, row_size: int, world_size: int, unit: str) -> int:
    """The number of micro-batches per step and rank, for a step of `total_batch` units (tokens or conversations).

    Raises UserError, with the nearest valid totals, when it is not a whole number.
    """
    micro = rows * row_size * world_size
    if total_batch % micro:
        below, above = total_batch // micro * micro, -(-total_batch // micro) * micro
        nearest = " or ".join(str(n) for n in (below, above) if n > 0)
        raise UserError(
            f"a step of {total_batch} {unit} is not a multiple of the {micro} {unit} that {world_size} process(es) take at "
            f"once{f' ({rows} rows of {row_size} each)' if rows * row_size > 1 else ''}; the nearest valid totals are {nearest}"
        )
    return total_batch // micro


class StepSize(NamedTuple):
    """How the processes share a step: each takes `accumulation` micro-batches of `rows` rows."""

    rows: int
    accumulation: int
    total: int  # tokens or conversations of the whole step


def gated_step_size(
    options: TrainOptions, stage: str, paths: Paths, shape: GPTConfig, store: CheckpointStore
) -> tuple[GPTConfig, dict[str, float] | None, StepSize]:
    """The model with the gate's implementations, the gate's times of a micro-step, and the size of the steps of base or mid.

    The rows of a micro-batch are chosen for these implementations, and are no more than the gate was made for. Raises UserError as
    take_gate, rows_that_fit, step_size and check_gate_rows do.
    """
    shape, micro_step_ms = take_gate(paths, shape, 1, store.runtime, options.run.deterministic)
    fitting = partial(
        rows_that_fit,
        shape,
        store.runtime,
        options.run.execution,
        options.device_batch_size,
        micro_step_ms=micro_step_ms,
    )
    most = fitting(most=min(MOST_ROWS, gate_rows(paths) or MOST_ROWS))
    size = step_size(options, stage, shape.context_length, store, most, lambda rows: fitting(most=rows))
    check_gate_rows(paths, size.rows)
    return shape, micro_step_ms, size


def step_size(
    options: TrainOptions, stage: str, row_size: int, store: CheckpointStore, most: int = 0,
    fitting: Callable[[int], int] | None = None,
) -> StepSize:  # fmt: skip
    """The size of the steps of a stage, for the number of processes that there are.

    What a preset says about it is only a wish, because the preset serves any number of processes: rows of a micro-batch at most,
    and the nearest total that they can share. What the user says is kept, and so are the total of a run that is resumed and, where
    they were chosen by the GPU, its rows: `most` is what is chosen here, and fitting(n) how many of n rows fit. Raises UserError if
    the processes cannot share that. For rl a row is a question.
    """
    runtime, unit = store.runtime, {"sft": "conversations", "rl": "questions"}.get(stage, "tokens")
    name = "total_batch_size" if unit == "tokens" else "examples_per_step"
    preset = with_preset(type(options)(), f"train {stage}", options.preset)
    total, before = getattr(options, name), store.newest_settings()
    # other rows would learn the same, with sums that are rounded otherwise
    kept = None if options.device_batch_size else before.get("rows")
    rows = options.device_batch_size or kept or most
    fixed = options.device_batch_size > 0 and (options.preset == "" or rows != preset.device_batch_size)
    if unit == "questions":  # they are shared whole; their answers are then cut into micro-batches of any size
        rows, fixed = 1, False
    given = options.preset == "" or total != getattr(preset, name)
    # earlier versions had no other size than that of the option
    saved = None if given else before.get("step_size", before.get(name))
    if saved is not None:
        check_shape(saved, int, f"the size of the steps of the run in {store.directory}")
    size = shared(saved or total, rows, row_size, runtime.world_size, fixed, exact=given or saved is not None)
    who = "1 process" if runtime.world_size == 1 else f"{runtime.world_size} processes"
    who += f" with {rows} rows at a time" if fixed else ""
    if saved and size.total != saved:
        each, rest = divmod(saved, row_size * runtime.world_size)
        counts = [n for n in range(1, 17) if shared(saved, rows, row_size, n, exact=True).total == saved]
        remedy = f"{' or '.join(map(str, counts))} processes" if rest else f"a --device-batch-size that divides {each}"
        raise UserError(
            f"the steps of the run in {store.directory} have {saved} {unit}, which {who} cannot share; "
            f"resume it with {remedy}, or move {store.directory} away to start again"
        )
    if kept and size.rows > most and (most := fitting(size.rows) if fitting else most) < size.rows:
        fewer = shared(size.total, most, row_size, runtime.world_size, exact=True).rows
        raise UserError(
            f"the run in {store.directory} has micro-batches of {size.rows} rows, and {most} fit on {runtime.device_name}; to go on "
            f"with fewer, whose sums are rounded otherwise, give --device-batch-size {fewer}"
        )
    if given:
        accumulation_steps(total, rows if fixed else 1, row_size, runtime.world_size, unit)
    elif fixed and not saved:
        each, rest = divmod(total, row_size * runtime.world_size)
        if not rest and each % rows:
            raise UserError(
                f"the steps of the preset {options.preset} have {total} {unit}, which {who} cannot share; give a --device-batch-size "
                f"that divides {each}, or --{name.replace('_', '-')} too"
            )
    if saved and saved != total and runtime.primary:
        say(
            f"steps of {saved:,} {unit}, as in the run that is resumed, where the preset {options.preset} has {total:,}"
        )
    elif size.total != total and runtime.primary:
        share = f"{size.accumulation} {unit}" if unit == "questions" else f"{size.accumulation} × {size.rows} rows"
        say(
            f"steps of {size.total:,} {unit}: {who} cannot share the {total:,} of the preset "
            f"{options.preset}, and this is the nearest number; each takes {share}"
        )
    return size


def shared(total: int, rows: int, row_size: int, processes: int, fixed: bool = False, exact: bool = False) -> StepSize:
    """The step nearest to `total` that the processes can share, with micro-batches of at most `rows` rows.

    These have at least half as many rows as they could, so that they keep a device busy; with `exact`, any number; with `fixed`,
    `rows`.
    """
    share = total / (row_size * processes)  # rows of a step for each process
    most = min(rows, max(1, round(share)))
    candidates = [rows] if fixed else range(most, 0 if exact else (most - 1) // 2, -1)
    counts = [(number, max(1, round(share / number))) for number in candidates]
    sizes = [StepSize(number, times, number * times * row_size * processes) for number, times in counts]
    return min(sizes, key=lambda size: (abs(size.total - total), size.accumulation))


def horizon(options: TrainBaseOptions, model: GPTConfig) -> int:
    """The number of steps of pretraining. Raises UserError when no horizon is set or when it is less than one step."""
    if options.num_iterations > 0:
        return options.num_iterations
    if options.target_flops > 0:
        steps = round(options.target_flops / (model.flops_per_token * options.total_batch_size))
    elif options.target_param_data_ratio > 0:
        steps = int(options.target_param_data_ratio * model.num_parameters) // options.total_batch_size
    else:
        raise UserError("set one of num_iterations, target_flops and target_param_data_ratio to a positive number")
    if steps < 1:
        raise UserError(f"the horizon is less than one step of {options.total_batch_size} tokens; raise it")
    return steps


def learning_settings(options: TrainOptions) -> dict:
    """The options of a stage that determine what is learned; a resumed run must have the same values.

    The rows of a micro-batch are not among them, because a step is accumulated from as many micro-batches as it needs. Nor are those
    that are sampled at a time: they only decide which random numbers an answer gets.
    """
    # files may move; what is in them is in the fingerprint of the data
    may_change = ("preset", "run_name", "impl", "run", "device_batch_size", "sample_rows", "custom_json", *MEASUREMENTS)
    return {key: value for key, value in _as_json(asdict(options)).items() if key not in may_change}


def filled_in(saved: dict, settings: dict) -> dict:
    """The settings that a checkpoint has, with the values of options that the version which saved it did not have."""
    known = {name: value for name, value in EARLIER_VALUES.items() if name in settings}
    if isinstance(saved.get("optimizer"), dict):
        saved = saved | {"optimizer": {"weight_decay": 0.0, **saved["optimizer"]}}
    return known | saved


def _as_json(value):
    """A value as JSON would give it back (tuples become lists), so that saved and present settings can be compared."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
