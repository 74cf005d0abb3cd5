"""The options of `nanochat report`."""

from dataclasses import dataclass
from typing import Annotated

from nanochat.options.ranges import AtLeast


@dataclass(frozen=True)
class ReportOptions:
    """Write report.md and report.html from what the stages have told so far."""

    price_per_hour: Annotated[float, AtLeast(0)] = 0.0
    """what an hour of the machine costs, in any currency; 0: left out"""
