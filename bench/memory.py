"""The memory of training: the largest micro-batch that fits on a card, as predicted; on a GPU, what is predicted and measured.

The table needs no GPU. --measure trains steps on the GPU here, each variant by itself, and compares the peak of a micro-step, what
PyTorch reserves over whole steps, and the bytes of a token and layer, which are those that one more row takes.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import torch
from rich.table import Table

from nanochat.gpt import GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations, Recompute
from nanochat.options.ranges import AtLeast
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import start_runtime
from nanochat.platform.files import write_json
from nanochat.train.memory import largest_rows, predict, predict_run, saved_per_token
from nanochat.train.micro_step import MicroStep
from nanochat.train.plan import shared
from nanochat.train.timing import random_batch, trained_model

# architecture, and memory in GiB as torch reports it
CARDS = {
    "A100 40 GB": ("sm80", 39.4),
    "A100 80 GB": ("sm80", 79.1),
    "H100 80 GB": ("sm90", 79.1),
    "H200 141 GB": ("sm90", 139.8),
}
PLAIN = Implementations(**dict.fromkeys(vars(Implementations()), "reference"))
# execution, implementations and recomputed parts
VARIANTS: dict[str, tuple[str, Implementations, tuple[Recompute, ...]]] = {
    "fused": ("graph", Implementations(), ()),
    "fused, --recompute mlp": ("graph", Implementations(), ("mlp",)),
    "fused, --recompute attention mlp": ("graph", Implementations(), get_args(Recompute)),
    "plain, compiled": ("compile", PLAIN, ()),
}


@dataclass(frozen=True)
class MemoryConfig:
    """Print how many rows of a micro-batch fit on which card."""

    depth: Annotated[tuple[int, ...], AtLeast(1)] = (12, 20, 26, 32)
    """blocks of the models"""
    tokens: Annotated[int, AtLeast(1)] = 2048
    """tokens per row"""
    vocab_size: Annotated[int, AtLeast(1)] = 65536
    """size of the vocabulary"""
    processes: Annotated[int, AtLeast(1)] = 8
    """GPUs that train together"""
    most: Annotated[int, AtLeast(1)] = 256
    """largest number of rows to look for"""
    measure: bool = False
    """measure on this GPU too"""
    rows: Annotated[tuple[int, ...], AtLeast(1)] = (4, 16)
    """rows of the micro-batches that are measured; the slope between the first and the last gives the bytes of a token"""
    json: Path | None = None
    """file for all numbers"""


def model_of(depth: int, variant: str, config: MemoryConfig) -> GPTConfig:
    _, impl, recompute = VARIANTS[variant]
    return GPTConfig.from_depth(depth, config.vocab_size, config.tokens, impl=impl, recompute=recompute)


def fitting(config: MemoryConfig) -> list[dict]:
    """Return for each model, variant and card the rows that fit, and the rows and micro-batches of a step of 524,288 tokens."""
    found = []
    for depth in config.depth:
        for variant, (execution, _, _) in VARIANTS.items():
            model = model_of(depth, variant, config)
            for card, (architecture, gib) in CARDS.items():
                options = config.processes, execution, architecture
                rows = largest_rows(
                    lambda rows, model=model, options=options: predict(model, rows, *options),
                    gib * 2**30, config.most,
                )  # fmt: skip
                size = shared(524_288, min(rows, 32), config.tokens, config.processes) if rows else None
                found.append(
                    {
                        "depth": depth, "variant": variant, "card": card, "rows": rows,
                        "step": [size.accumulation, size.rows] if size else None,
                    }
                )  # fmt: skip
    return found


def show_fitting(found: list[dict], config: MemoryConfig) -> None:
    say(
        f"largest micro-batch in rows of {config.tokens:,} tokens with {config.processes} GPUs, and how each GPU then takes its share "
        "of a step of 524,288 tokens"
    )
    table = Table("model", "variant", *CARDS, box=None)
    for depth in config.depth:
        for variant in VARIANTS:
            cells = [
                f"{row['rows']}: {row['step'][0]} × {row['step'][1]}" if row["step"] else "0"
                for row in found
                if (row["depth"], row["variant"]) == (depth, variant)
            ]
            table.add_row(f"d{depth}", variant, *cells)
    show_table(table)


def show_bytes(config: MemoryConfig) -> None:
    table = Table("model", "variant", "bytes saved a token and layer", "a channel", box=None)
    for depth in config.depth:
        for variant in VARIANTS:
            if VARIANTS[variant][0] == "graph":
                model = model_of(depth, variant, config)
                size = saved_per_token(model)
                table.add_row(f"d{depth}", variant, f"{size:,}", f"{size / model.width:.1f}")
    show_table(table)


def measured(model: GPTConfig, rows: int, execution: str, device: torch.device) -> dict:
    """Return the peak of allocated bytes in a micro-step, and the bytes that PyTorch has reserved after three whole steps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    gpt = trained_model(model, device, torch.bfloat16)
    optimizer = MuonAdamW(gpt)
    step, batch = MicroStep(gpt, optimizer, execution, one_length=True), random_batch(model, rows)
    for _ in range(4):
        step(batch, 0.125)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    for _ in range(4):  # the third update is captured
        optimizer.synchronize()
        optimizer.update(1.0, 0.9)
        step(batch, 0.125)
    with torch.inference_mode():
        on_device = batch.to(device)
        gpt(on_device.inputs, on_device.targets, reduction="none")
    torch.cuda.synchronize()
    return {
        "peak": peak,
        "reserved": torch.cuda.max_memory_reserved() - before,
        "outside": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved(),
    }


def measure(config: MemoryConfig) -> list[dict]:
    """Return predicted and measured bytes for each model, variant and number of rows; a note where it runs out of memory."""
    found: list[dict] = []
    with start_runtime("cuda") as runtime:
        for depth in config.depth:
            for variant, (execution, _, _) in VARIANTS.items():
                model = model_of(depth, variant, config)
                slopes = []
                for rows in config.rows:
                    predicted = predict_run(model, rows, runtime, execution)
                    row = {
                        "depth": depth, "variant": variant, "rows": rows, "tokens": config.tokens,
                        "predicted_peak": predicted.micro_step, "predicted_reserved": predicted.total,
                    }  # fmt: skip
                    try:
                        row |= measured(model, rows, execution, runtime.device)
                        slopes.append((rows, row["peak"], row["predicted_peak"]))
                    except torch.OutOfMemoryError as error:
                        row["note"] = str(error).splitlines()[0][:120]
                    torch._dynamo.reset()
                    found.append(row)
                    _show_measured(row)
                if len(slopes) > 1:
                    (few, *low), (many, *high) = slopes[0], slopes[-1]
                    token_layers = (many - few) * config.tokens * depth
                    per_layer = [(b - a) / token_layers for a, b in zip(low, high, strict=True)]
                    found[-1]["bytes_per_token_and_layer"] = per_layer
                    say(
                        f"  d{depth} {variant}: {per_layer[0]:,.0f} bytes a token and layer with the head's share, predicted "
                        f"{per_layer[1]:,.0f}"
                    )
    return found


def _show_measured(row: dict) -> None:
    name = f"d{row['depth']} {row['variant']}, {row['rows']} × {row['tokens']}:"
    if "note" in row:
        return say(f"{name} {row['note']}; predicted {row['predicted_reserved'] / 1e9:.2f} GB")
    pairs = [(what, row[what] / 1e9, row[f"predicted_{what}"] / 1e9) for what in ("peak", "reserved")]
    text = ", ".join(
        f"{what} {real:.2f} GB, predicted {wanted:.2f} ({wanted / real:.3f} ×)" for what, real, wanted in pairs
    )
    say(f"{name} {text}; outside of PyTorch {row['outside'] / 1e9:.2f} GB")


def memory(config: MemoryConfig, command: str) -> None:
    found: dict = {"command": command, "rows": fitting(config)}
    show_fitting(found["rows"], config)
    show_bytes(config)
    if config.measure:
        from bench.measure import header

        found = header(command) | found | {"measured": measure(config)}
    if config.json:
        write_json(config.json, found)
