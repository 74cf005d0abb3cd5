"""What a training stage is about to do: its batches, steps, learning rate and evaluations."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from nanochat.data.batches import Batch
from nanochat.gpt import GPTConfig
from nanochat.options.train import TrainBaseOptions, TrainOptions
from nanochat.platform.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """A measurement after every `every` steps and at the end. 0: only at the end; negative: never."""

    every: int
    measure: Callable[[], dict]
    first: bool = False  # also before the first step

    def due(self, step: int, last: bool) -> bool:
        if self.every < 0:
            return False
        return last or (self.first if step == 0 else self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class Plan:
    """What distinguishes one training stage from another."""

    stage: str
    batches: Callable[[list | None], Iterator[Batch]]  # from the saved positions of all ranks; None: from the beginning
    accumulation: int  # micro-batches per step on each rank
    lr_multiplier: Callable[[float], float]  # of the progress, 0 to 1
    steps: int | None  # None: until the data ends
    one_length: bool = True  # the rows of all batches have the same length
    evaluations: list[Evaluation] = field(default_factory=list)


def accumulation_steps(total_batch: int, rows: int, row_size: int, world_size: int, unit: str) -> int:
    """Micro-batches per step. Raises UserError naming the nearest valid totals when it is not a whole number."""
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
    """Steps of pretraining. Raises UserError when no horizon is set or it is under one step."""
    if options.num_iterations > 0:
        return options.num_iterations
    if options.target_flops > 0:
        steps = round(options.target_flops / (model.flops_per_token * options.total_batch_size))
    elif options.target_param_data_ratio > 0:
        steps = int(options.target_param_data_ratio * model.num_parameters) // options.total_batch_size
    else:
        raise UserError("set one of num_iterations, target_flops and target_param_data_ratio to a positive number")
    if steps < 1:
        raise UserError(f"the horizon is under one step of {options.total_batch_size} tokens; raise it")
    return steps


def learning_settings(options: TrainOptions) -> dict:
    """The options of a stage that decide what is learned; a resumed run must have the same.

    The number of rows that a process takes at once is not among them: a step is accumulated from as many as it takes.
    """
    free = ("preset", "impl", "run", "device_batch_size")
    return {key: value for key, value in _plain(asdict(options)).items() if key not in free}


def _plain(value):
    """As JSON gives it back, so that saved and given settings can be compared."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
