"""What the stages tell the report: a JSON file each, written whole."""

import time

from nanochat.platform.files import read_json, write_json
from nanochat.platform.paths import Paths

TITLES = {
    "data": "Embedded data",
    "tokenizer": "Tokenizer",
    "tokenizer-eval": "Tokenizer evaluation",
    "base": "Pretraining",
    "base-eval": "Evaluation after pretraining",
    "mid": "Midtraining",
    "mid-eval": "Evaluation after midtraining",
    "sft": "Fine-tuning",
    "sft-eval": "Evaluation after fine-tuning",
}


def write_section(paths: Paths, stage: str, settings: dict, results: dict, seconds: float, processes: int) -> None:
    section = {
        "stage": stage,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": seconds,
        "processes": processes,
        "settings": settings,
        "results": results,
    }
    write_json(paths.section(stage), section)


def read_section(paths: Paths, stage: str) -> dict | None:
    """None when the stage has not written one, or one that cannot be read."""
    return read_json(paths.section(stage))
