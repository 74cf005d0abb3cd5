"""The sections of the report: each stage writes its settings and results to a JSON file."""

import time

from nanochat.options.evaluate import SAMPLES
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
    "rl": "Reinforcement learning",
    "rl-eval": "Evaluation after reinforcement learning",
    "hf-eval": "Evaluation of another model",
}
OPTIONAL = ("rl", "rl-eval", "hf-eval")  # the report leaves them out if they have not run
SHAPE = {"finished": str, "seconds": float, "processes": int, "settings": {str: object}, "results": {str: object}}


def write_section(paths: Paths, stage: str, settings: dict, results: dict, seconds: float, processes: int) -> None:
    """Write the section of a stage that has finished after `seconds`."""
    section = {
        "stage": stage,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": seconds,
        "processes": processes,
        "embedded": paths.reads_embedded,
        "settings": settings,
        "results": results,
    }
    write_json(paths.section(stage), section)


def read_samples(paths: Paths) -> list[tuple[str, str]]:
    """The conversation with the last model that was evaluated: who says what."""
    for stage in ("rl-eval", "sft-eval", "mid-eval"):
        samples = (read_section(paths, stage) or {"results": {}})["results"].get(SAMPLES)
        if isinstance(samples, list) and samples:
            return [
                (name, str(text)) for sample in samples if isinstance(sample, dict) for name, text in sample.items()
            ]
    return []


def read_section(paths: Paths, stage: str) -> dict | None:
    """The section of a stage; None when it is missing or damaged."""
    section = read_json(paths.section(stage), SHAPE)
    # earlier versions did not say what the data were
    return section and {"embedded": paths.reads_embedded, **section}
