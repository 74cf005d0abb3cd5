"""The progress of a training run: what a checkpoint stores besides weights and optimizer state; and the time left."""

import time
from dataclasses import dataclass, field

# what meta.json holds for training, besides what nanochat/checkpoint.py needs
SHAPE = {"settings": {str: object}, "positions": [[int]], "elapsed": float, "seconds": float, "tokens": int}


@dataclass
class TrainState:
    """The state between two steps, after `step` updates."""

    step: int = 0
    loss: float | None = None  # of the last step, in nats; None before the first one
    elapsed: float = 0.0  # seconds spent in steps since step 0, also before the run was resumed
    earlier_seconds: float = 0.0  # of the starts that this one resumes, with their evaluations
    tokens: int = 0  # trained on, over all ranks
    position: tuple[int, ...] = ()  # where this rank's next batch begins
    began: float = field(default_factory=time.perf_counter)  # this start, by the clock of its process

    def advance(self, loss: float, tokens: int, seconds: float, position: tuple[int, ...]) -> None:
        """Count a step, with its loss in nats, its tokens over all ranks, and its duration."""
        self.step += 1
        self.loss = loss
        self.tokens += tokens
        self.elapsed += seconds
        self.position = position

    def to_meta(self, positions: list) -> dict:
        """The state as meta.json stores it, with the positions of all ranks."""
        return {
            "positions": positions,
            "loss": self.loss,
            "elapsed": self.elapsed,
            "seconds": self.earlier_seconds + time.perf_counter() - self.began,
            "tokens": self.tokens,
        }

    @classmethod
    def from_meta(cls, meta: dict) -> "TrainState":
        # earlier versions saved a smoothed loss only
        return cls(meta["step"], meta.get("loss"), meta["elapsed"], meta["seconds"], meta["tokens"])


class Pace:
    """Estimates the time left from the steps of this process, without its first ones, which compile kernels and capture graphs."""

    WARM_UP_STEPS = 3

    def __init__(self) -> None:
        self.steps, self.seconds, self.start = 0, 0.0, 0.0

    def remaining(self, seconds: float, done: float) -> float | None:
        """Count a step of `seconds`, after which the share `done` of training is over; returns the seconds left, if known."""
        self.steps += 1
        if self.steps <= self.WARM_UP_STEPS:
            self.start = done
            return None
        self.seconds += seconds
        progress = done - self.start
        return self.seconds * (1 - done) / progress if progress > 0 else None
