"""The plan of a training stage: its batches, steps, learning rate and evaluations."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from nanochat.data.batches import Batch
from nanochat.gpt import GPTConfig
from nanochat.options.train import TrainBaseOptions, TrainOptions
from nanochat.platform.errors import UserError
from nanochat.train.schedules import muon_momentum


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
    accumulation: int  # micro-batches per step on each rank
    lr_multiplier: Callable[[float], float]  # a function of the progress, 0 to 1
    steps: int | None  # None: until the data ends
    momentum: Callable[[int], float] = muon_momentum  # of Muon, a function of the step
    one_length: bool = True  # the rows of all batches have the same length
    evaluations: list[Evaluation] = field(default_factory=list)


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
            f"once ({rows} rows of {row_size} each); the nearest valid totals are {nearest}"
        )
    return total_batch // micro


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

    The rows of a micro-batch are not among them, because a step is accumulated from as many micro-batches as it needs.
    """
    may_change = ("preset", "impl", "run", "device_batch_size")
    return {key: value for key, value in _as_json(asdict(options)).items() if key not in may_change}


def _as_json(value):
    """A value as JSON would give it back (tuples become lists), so that saved and present settings can be compared."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
