"""Learning rate and momentum over training."""

from collections.abc import Callable


def trapezoid(warmup: float, warmdown: float, final: float = 0.0, step: float = 0.0) -> Callable[[float], float]:
    """A multiplier of the learning rate for each progress (0 to 1): linear from 0 to 1 over the first `warmup` of training, 1, then
    linear to `final` over the last `warmdown`.

    step: the share that a step is of training. The multiplier of a step in warmup is that after it, so that the first one counts.
    """

    def multiplier(progress: float) -> float:
        rise = (progress + step) / warmup if progress < warmup else 1.0
        fall = (1.0 - progress) / warmdown if progress > 1.0 - warmdown else 1.0
        return min(1.0, rise) * (fall + (1.0 - fall) * final)

    return multiplier


def linear_decay(start: float) -> Callable[[float], float]:
    """A multiplier of the learning rate for each progress (0 to 1): linear from `start` to 0."""
    return lambda progress: start * (1 - progress)


def muon_momentum(step: int) -> float:
    """Muon's momentum at a step: it rises from 0.85 to 0.95 over the first 300 steps."""
    return 0.85 + 0.1 * min(step / 300, 1.0)


def full_momentum(_step: int) -> float:
    """Muon's momentum where it does not rise."""
    return 0.95
