"""Hours and dollars of the whole d20 speedrun, part by part, from what a step takes: for python -m bench simulate --measured.

A step comes from `python -m bench scaling` on the GPUs that were measured, and from the simulation on A100s. How many steps, tokens,
evaluations and saves there are comes from the options of the preset, and how many conversations from the list of its data. What is
known of neither is in ASSUMED, with a range. Every number is (low, middle, high); a sum of them has all parts at the same end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import numpy as np
from rich.table import Table

from bench.simulation_inputs import Input
from nanochat.gpt import GPTConfig
from nanochat.options.evaluate import EvaluateBaseOptions
from nanochat.options.presets import with_preset
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainSftOptions
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_shape
from nanochat.speedrun.assets import CORE_TASKS, assets
from nanochat.speedrun.stages import STAGES
from nanochat.train.midtrain import HELD_OUT_GSM8K, HELD_OUT_MMLU
from nanochat.train.plan import horizon

PRESET, VARIANT = "d20", "fused"
ASSUMED = {
    "forward": Input(0.28, 0.40, "time of a forward pass over that of forward and backward, which has three times the products"),
    "item": Input(300, 1_500, "tokens of an item of CORE with its examples, over all of its choices"),
    "items": Input(80_000, 100_000, "items of all tasks of CORE"),
    "smoltalk": Input(700, 1_100, "tokens of a general conversation: 900 MB of compressed text are 2 KB each"),
    "short": Input(60, 200, "tokens of any other conversation"),
    "padded": Input(600, 1_400, "tokens of a row of fine-tuning, with padding"),
    "small": Input(1.0, 2.5, "time of a token in fine-tuning's small micro-batches over that in pretraining's"),
    "chat": Input(60, 300, "seconds of the chat tasks: 17,590 forward passes and 1,739 answers of up to 512 tokens"),
    "write": Input(0.5e9, 3e9, "bytes/s at which all ranks together write a checkpoint"),
    "start": Input(15, 60, "seconds until the processes of a stage have imported torch and captured their graphs"),
    "tokenizer": Input(60, 300, "seconds to train the tokenizer on 2 billion characters"),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a training step takes on a machine, in seconds: (low, middle, high)."""

    name: str
    step: np.ndarray  # a step of pretraining
    micro: np.ndarray  # the part of it in which tokens are computed
    dollars_per_hour: float


def measured_rows(path: Path) -> list[dict]:
    """The rows of d20 that scaling measured. Raises UserError for a file of another form, or without any."""
    row = {"depth": int, "variant": str, "gpus": int, "rows": int, "tokens": int}
    found = read_shape(path, {"device": str, "rows": [row]})
    rows = [
        row | {"device": found["device"]} for row in found["rows"] if (row["depth"], row["variant"]) == (20, VARIANT)
    ]
    rows = [row for row in rows if "note" not in row]
    if not rows:
        raise UserError(
            f"{path} has no row of d20, {VARIANT}, that was measured; make one with: python -m bench scaling --gpus 1 8 --json {path}"
        )
    return sorted(rows, key=lambda row: row["gpus"])


def machine(row: dict, dollars_per_hour: float) -> Machine:
    """The machine on which scaling measured a row: the steps of pretraining there, of which each may need several micro-steps.

    Raises UserError if the row cannot make up such a step.
    """
    wanted = TrainBaseOptions().total_batch_size
    micro_steps, rest = divmod(wanted, row["rows"] * row["tokens"] * row["gpus"])
    if rest or micro_steps < row["micro_steps"]:
        raise UserError(
            f"steps of {wanted:,} tokens are no multiple of what scaling measured on {row['gpus']} GPUs; choose --rows 16 or 32"
        )
    low, _, high = quantiles(row["samples"]["step"], n=4) if len(row["samples"]["step"]) > 1 else [row["step_ms"]] * 3
    more = (micro_steps - row["micro_steps"]) * row["micro_ms"] / row["micro_steps"]
    step = np.array([low, median(row["samples"]["step"]), high]) + more
    micro = np.full(3, micro_steps * row["micro_ms"] / row["micro_steps"])
    return Machine(f"{row['gpus']} × {row['device']}", step * 1e-3, micro * 1e-3, dollars_per_hour)


def simulated(prediction: dict, dollars_per_hour: float) -> Machine:
    """A machine of the simulation."""
    parts = prediction["parts_ms"]
    step = np.array(prediction["step_ms"]) * 1e-3
    micro = step * (parts["products"] + parts["attention"] + parts["other passes"]) / sum(parts.values())
    return Machine(f"{prediction['gpus']} × {prediction['card']}, simulated", step, micro, dollars_per_hour)


def ends(name: str) -> np.ndarray:
    given = ASSUMED[name]
    return np.array([given.low, (given.low + given.high) / 2, given.high])


def parts(machine: Machine) -> Iterator[tuple[str, np.ndarray, str]]:
    """(part of the speedrun, its seconds, where they come from), in order."""
    base = with_preset(TrainBaseOptions(), "train base", PRESET)
    mid, sft = with_preset(TrainMidOptions(), "train mid", PRESET), with_preset(TrainSftOptions(), "train sft", PRESET)
    evaluation = with_preset(EvaluateBaseOptions(), "evaluate base", PRESET)
    model = GPTConfig.from_depth(base.depth, 65_536, base.context_length)
    rows = {asset.name: asset.rows for asset in assets(PRESET)}
    token = machine.micro / base.total_batch_size  # forward and backward of a token, by all GPUs together
    forward = token * ends("forward")
    steps = horizon(base, model)
    count = steps // base.eval_every + 1 + (steps % base.eval_every > 0)
    embeddings = 2 * model.vocab_size * model.width
    save = (8 * (model.num_parameters - embeddings) + 12 * embeddings) / ends("write")[::-1]
    chosen = CORE_TASKS * base.core_metric_max_per_task
    cores = steps // base.core_metric_every + (steps % base.core_metric_every > 0)

    yield "tokenizer", ends("tokenizer"), "assumed"
    yield "base: steps", steps * machine.step, f"{steps:,} steps of {base.total_batch_size:,} tokens"
    yield (
        "base: bits per byte",
        count * base.eval_tokens * forward,
        f"{count} times {base.eval_tokens:,} tokens, every {base.eval_every} steps",
    )
    yield (
        "base: CORE",
        cores * chosen * ends("item") * forward,
        f"{cores} times at most {chosen:,} items, every {base.core_metric_every} steps",
    )
    yield "base: saves", (count - 1) * save, f"{count - 1} times, as every evaluation but the first comes after one"
    whole = (2 * evaluation.tokens + ends("items") * ends("item")) * forward
    yield "base-eval", whole, f"{evaluation.tokens:,} tokens of train and val, and all items of CORE"
    short = rows["mmlu/auxiliary_train"] + rows["gsm8k/train"] + mid.identity_repeats * rows["identity"]
    short += mid.simple_spelling + mid.spelling_bee
    tokens = rows["smoltalk/train"] * ends("smoltalk") + short * ends("short")
    mid_steps = tokens / mid.total_batch_size
    yield (
        "mid: steps",
        mid_steps * machine.step,
        f"{mid_steps[0]:,.0f} to {mid_steps[2]:,.0f} steps: one epoch of its conversations",
    )
    held_out = rows["smoltalk/test"] * ends("smoltalk") + (HELD_OUT_MMLU + HELD_OUT_GSM8K) * ends("short")
    evaluations = mid_steps // mid.eval_every + 2
    yield (
        "mid: bits per byte and saves",
        evaluations * held_out * forward + (evaluations - 1) * save,
        f"every {mid.eval_every} steps",
    )
    yield "mid-eval", ends("chat"), "assumed"
    conversations = (
        rows["arc-easy/train"] + rows["arc-challenge/train"] + rows["gsm8k/train"] + sft.smoltalk + sft.identity
    )
    sft_steps = (conversations + sft.simple_spelling + sft.spelling_bee) // sft.examples_per_step
    one = sft.examples_per_step * ends("padded") * ends("small") * token + (machine.step - machine.micro)
    yield "sft: steps", sft_steps * one, f"{sft_steps} steps of {sft.examples_per_step} conversations"
    evaluations = sft_steps // sft.eval_every + 2
    measured = evaluations * sft.eval_rows * ends("padded") * forward + (evaluations - 1) * save
    yield "sft: losses and saves", measured, f"{evaluations} times {sft.eval_rows} held-out conversations"
    yield "sft-eval", ends("chat"), "assumed"
    stages = sum(not stage.optional and stage.name != "data" for stage in STAGES)
    yield "starts", stages * ends("start"), f"{stages} stages, with tokenizer-eval and report"


def run_of(machine: Machine) -> dict:
    """The parts of the speedrun on a machine, with hours and dollars; and their sum."""
    found = [{"part": part, "hours": (seconds / 3600).tolist(), "from": why} for part, seconds, why in parts(machine)]
    total = np.sum([part["hours"] for part in found], axis=0)
    dollars = (total * machine.dollars_per_hour).tolist() if machine.dollars_per_hour else None
    return {
        "machine": machine.name,
        "parts": found,
        "hours": total.tolist(),
        "dollars_per_hour": machine.dollars_per_hour,
        "dollars": dollars,
    }


def show_cost(runs: list[dict]) -> Table:
    table = Table("hours (low to high)", *(run["machine"] for run in runs), "from", box=None)
    for same in zip(*(run["parts"] for run in runs), strict=True):
        table.add_row(same[0]["part"], *(_range(part["hours"]) for part in same), same[0]["from"])
    table.add_row("all", *(_range(run["hours"]) for run in runs))
    if any(run["dollars"] for run in runs):
        table.add_row("dollars", *(_range(run["dollars"], 0) if run["dollars"] else "" for run in runs))
    return table


def _range(values: list[float], digits: int = 2) -> str:
    low, middle, high = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def narrowed(rows: list[dict]) -> dict[str, Input]:
    """The inputs `open_reduce` and `open_gather` of the simulation, as the GPUs that were measured have them. rows: of one model, in
    order of their numbers of GPUs.

    A step that exchanges its gradients at its end takes longer by the part of the exchange that the other step hides. All-gather is as
    fast as reduce-scatter; the update on many GPUs is that share of the update on one which is between 1/GPUs and all of it, up to the
    rest, which is gathering in the open. Where the steps exchange at their end, as on Hopper, they tell nothing about an A100's
    reduce-scatter.
    """
    alone, many = rows[0], rows[-1]
    if alone["gpus"] != 1 or many["gpus"] < 2 or many["exchange_ms"] <= 0:
        return {}
    model = GPTConfig.from_depth(many["depth"], many["vocab_size"], many["tokens"])
    hidden = sorted(
        (late - step) / many["exchange_ms"] for late, step in zip(many["samples"]["late"], many["samples"]["step"], strict=True)
    )  # fmt: skip
    # float32 gradients against updates in bfloat16 and new rows in float32, as in simulate.step_parts
    gather = (
        many["exchange_ms"]
        * (2 * model.num_parameters + 4 * model.vocab_size * model.width)
        / (4 * model.num_parameters)
    )
    own = alone["update_ms"] / many["gpus"], alone["update_ms"]
    found = {
        "open_reduce": (1 - hidden[-1], 1 - hidden[0]),
        "open_gather": tuple((many["update_ms"] - x) / gather for x in own[::-1]),
    }
    if many["samples"]["step"] == many["samples"]["late"]:
        del found["open_reduce"]
    device = f"{many['gpus']} × {many['device']}"
    return {
        name: Input(*(min(1.0, max(0.0, value)) for value in given), f"as measured on {device}: part that nothing hides")
        for name, given in found.items()
    }  # fmt: skip
