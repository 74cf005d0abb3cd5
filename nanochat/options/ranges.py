"""The allowed range of an option, which is written in its type: `depth: Annotated[int, AtLeast(1)] = 20`."""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from nanochat.platform.errors import UserError


@dataclass(frozen=True)
class Between:
    """The numbers from `low` to `high`, both included. None, if the option allows it, is in every range."""

    low: float
    high: float = float("inf")

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high == float("inf") else f"between {self.low} and {self.high}"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class OrNegative(Between):
    """Numbers from 0 on, and negative ones, which all mean the same."""

    low: float = -math.inf
    meaning: str = "all"

    def __str__(self) -> str:
        return f"at least 0, or negative: {self.meaning}"


@dataclass(frozen=True)
class AnyInteger(Between):
    """The integers of 64 bits, such as seeds."""

    low: float = -(2**63)
    high: float = 2**63 - 1

    def __str__(self) -> str:
        return "an integer of 64 bits"


@dataclass(frozen=True)
class SomeOrAll(Between):
    """Numbers of items: from 1 on, or a negative number, which stands for all."""

    low: float = -math.inf

    def __str__(self) -> str:
        return "at least 1, or negative for all"

    def __contains__(self, value: float) -> bool:
        return value != 0


def AtLeast(low: float) -> Between:
    """The numbers from `low` on."""
    return Between(low)


def check_ranges(options: Any) -> None:
    """Raise UserError for the first option, also in nested dataclasses, that is out of its range, not finite, or too long."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            check_ranges(value)
            continue
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{option} must be an integer of 64 bits, got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{option} must be a finite number, got {value}")
        for allowed in getattr(hints[field.name], "__metadata__", ()):
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(allowed, Between) and each is not None and each not in allowed:
                    raise UserError(f"{option} must be {allowed}, got {each}")
