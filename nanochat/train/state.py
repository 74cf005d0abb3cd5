"""What a training run has reached: everything besides weights and optimizer that a checkpoint keeps."""

from dataclasses import dataclass

SMOOTHING = 0.95


@dataclass
class TrainState:
    """The state at a step boundary: `step` updates are done."""

    step: int = 0
    smoothed_loss: float = 0.0  # exponential mean, not yet corrected for its start at 0
    elapsed: float = 0.0  # seconds spent in steps, by all processes that the run has had
    tokens: int = 0
    position: tuple[int, ...] = ()  # of this rank's batches, after the last step

    @property
    def loss(self) -> float:
        """The smoothed training loss, in nats; 0 before the first step."""
        return self.smoothed_loss / (1 - SMOOTHING**self.step) if self.step else 0.0

    def advance(self, loss: float, tokens: int, seconds: float, position: tuple[int, ...]) -> None:
        """Count a step."""
        self.step += 1
        self.smoothed_loss = SMOOTHING * self.smoothed_loss + (1 - SMOOTHING) * loss
        self.tokens += tokens
        self.elapsed += seconds
        self.position = position

    def to_meta(self, positions: list) -> dict:
        """What meta.json keeps, with the positions of all ranks."""
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
    """How long the rest takes, judged by the steps of this process without its first ones, in which kernels are compiled and
    graphs are captured."""

    WARM_UP_STEPS = 3

    def __init__(self) -> None:
        self.steps, self.seconds, self.start = 0, 0.0, 0.0

    def remaining(self, seconds: float, done: float) -> float | None:
        """Count a step of `seconds` after which the share `done` of training is over; returns the seconds that are left."""
        self.steps += 1
        if self.steps <= self.WARM_UP_STEPS:
            self.start = done
            return None
        self.seconds += seconds
        progress = done - self.start
        return self.seconds * (1 - done) / progress if progress > 0 else None
