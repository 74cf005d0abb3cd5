"""Learning rate and momentum over training."""

from collections.abc import Callable


def warmdown(ratio: float) -> Callable[[float], float]:
    """A multiplier of the learning rate for each progress (0 to 1): 1, then linear to 0 over the last `ratio` of training."""
    return lambda progress: min(1.0, (1.0 - progress) / ratio) if ratio > 0 else 1.0


def linear_decay(start: float) -> Callable[[float], float]:
    """A multiplier of the learning rate for each progress (0 to 1): linear from `start` to 0."""
    return lambda progress: start * (1 - progress)


def muon_momentum(step: int) -> float:
    """Muon's momentum at a step: it rises from 0.85 to 0.95 over the first 300 steps."""
    return 0.85 + 0.1 * min(step / 300, 1.0)


def full_momentum(_step: int) -> float:
    """Muon's momentum where it does not rise."""
    return 0.95
