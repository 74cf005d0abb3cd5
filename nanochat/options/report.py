"""The options of `nanochat report`."""

from dataclasses import dataclass
from typing import Annotated

from nanochat.options.presets import NewestRun
from nanochat.options.ranges import AtLeast


@dataclass(frozen=True)
class ReportOptions(NewestRun):
    """Write report.md and report.html about the stages that have finished so far."""

    price_per_hour: Annotated[float, AtLeast(0)] = 0.0
    """price of the machine per hour, in any currency; 0: the report has no cost"""
