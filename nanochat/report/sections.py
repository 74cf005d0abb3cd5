"""What the stages tell the report: a JSON file each, written whole."""

import json
import os
import time
from pathlib import Path

from nanochat.paths import Paths

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
    """None when the stage has not told anything, or something unreadable."""
    try:
        return json.loads(paths.section(stage).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", "utf-8")
    os.replace(temporary, path)
