"""The progress of a training run: what a checkpoint stores besides weights and optimizer state; and the time left."""

from dataclasses import dataclass

SMOOTHING = 0.95  # of the loss that is printed: a mean over about the last 20 steps

# what meta.json holds for training, besides what nanochat/checkpoint.py needs
SHAPE = {"settings": {str: object}, "positions": [[int]], "smoothed_loss": float, "elapsed": float, "tokens": int}


@dataclass
class TrainState:
    """The state between two steps, after `step` updates."""

    step: int = 0
    smoothed_loss: float = 0.0  # exponential mean, not yet corrected for its start at 0
    elapsed: float = 0.0  # seconds spent in steps since step 0, also before the run was resumed
    tokens: int = 0  # trained on, over all ranks
    position: tuple[int, ...] = ()  # where this rank's next batch begins

    @property
    def loss(self) -> float:
        """The smoothed training loss, in nats; 0 before the first step."""
        return self.smoothed_loss / (1 - SMOOTHING**self.step) if self.step else 0.0

    def advance(self, loss: float, tokens: int, seconds: float, position: tuple[int, ...]) -> None:
        """Count a step, with its loss in nats, its tokens over all ranks, and its duration."""
        self.step += 1
        self.smoothed_loss = SMOOTHING * self.smoothed_loss + (1 - SMOOTHING) * loss
        self.tokens += tokens
        self.elapsed += seconds
        self.position = position

    def to_meta(self, positions: list) -> dict:
        """The state as meta.json stores it, with the positions of all ranks."""
        return {
            "positions": positions,
            "smoothed_loss": self.smoothed_loss,
            "elapsed": self.elapsed,
            "tokens": self.tokens,
        }

    @classmethod
    def from_meta(cls, meta: dict) -> "TrainState":
        return cls(meta["step"], meta["smoothed_loss"], meta["elapsed"], meta["tokens"])


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
