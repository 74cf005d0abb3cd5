"""Time a training micro-step on this GPU in the ways that training can run it: python -m bench.training_step --depth 12 20

A variant is EXECUTION:IMPL, such as graph:auto (the default of training) or compile:reference (the baseline). IMPL may be followed by
others for some operations: graph:auto,attention=cudnn. Variants take turns in one process, micro-steps follow each other without
waiting for the host, and tokens and weights are random, not zero. Host time is the time to launch a micro-step on an idle GPU.
--first-step times the start of a run, in a process of its own: python -m bench.training_step --first-step
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import median, quantiles

import torch
import tyro

from bench.measure import header
from nanochat.data.batches import Batch
from nanochat.gpt import GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.train.micro_step import MicroStep
from nanochat.train.timing import milliseconds, random_batch, trained_model


@dataclass(frozen=True)
class TrainingStepConfig:
    """Time forward and backward of a micro-batch, variant by variant."""

    depth: tuple[int, ...] = (12,)
    """blocks of the models"""
    rows: tuple[int, ...] = (16,)
    """rows of a micro-batch"""
    tokens: tuple[int, ...] = (1024,)
    """tokens per row"""
    vocab_size: int = 65536
    """size of the vocabulary"""
    layers: int = 0
    """number of blocks, if it differs from --depth, which still sets the width; 0: as many as --depth"""
    variants: tuple[str, ...] = ("graph:auto", "compile:reference")
    """variants to time, as EXECUTION:IMPL"""
    rounds: int = 7
    """samples of each variant"""
    seconds: float = 0.25
    """length of a sample, which has as many micro-steps as fit, at least two"""
    first_step: bool = False
    """time the first micro-step and the first update instead, with empty and with warm caches"""
    json: Path | None = None
    """file for every sample"""


def implementations(text: str) -> Implementations:
    """Parse IMPL[,OPERATION=IMPL]…: auto, reference or another implementation for every operation, and others for some."""
    impl, *others = text.split(",")
    names = [field.name for field in fields(Implementations)]
    chosen = dict.fromkeys(names, impl)
    for other in others:
        operation, _, of_operation = other.partition("=")
        if operation not in names or not of_operation:
            raise UserError(f"{text}: {other} is not OPERATION=IMPL with one of {', '.join(names)}")
        chosen[operation] = of_operation
    return Implementations(**chosen)


def prepare(variant: str, shape: GPTConfig, device: torch.device) -> MicroStep:
    """Return the micro-step of a model whose weights are all nonzero, as training leaves them, with its optimizer."""
    execution, _, impl = variant.partition(":")
    model = trained_model(replace(shape, impl=implementations(impl)), device, torch.bfloat16)
    optimizer = MuonAdamW(model)
    step = MicroStep(model, optimizer, execution, one_length=True)
    step.optimizer = optimizer
    return step


def host_milliseconds(step: MicroStep, data: Batch) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(data, 0.125)
        times.append(1e3 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    return median(times)


def measure(shape: GPTConfig, rows: int, config: TrainingStepConfig, device: torch.device) -> list[dict]:
    """Return a row of results for each variant; if it runs out of memory, the row has a note in place of times."""
    data, steps, found = random_batch(shape, rows), {}, {}
    for variant in config.variants:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            started = time.perf_counter()
            step = prepare(variant, shape, device)
            for _ in range(4):
                step(data, 0.125)
            torch.cuda.synchronize()
            found[variant] = {
                "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
                "start_s": time.perf_counter() - started,
                "host_ms": host_milliseconds(step, data),
                "loss": step.loss.item(),
                "samples_ms": [],
            }
            steps[variant] = step
        except torch.OutOfMemoryError as error:
            found[variant] = {"note": f"out of memory: {str(error).splitlines()[0][:120]}"}
            step = None
    counts = {name: max(2, int(1e3 * config.seconds / milliseconds(step, data, 2))) for name, step in steps.items()}
    names = list(steps)
    for number in range(config.rounds):
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            found[name]["samples_ms"].append(milliseconds(steps[name], data, counts[name]))
    rows_of_results = []
    for variant, row in found.items():
        common = {
            "variant": variant,
            "depth": shape.depth,
            "width": shape.width,
            "rows": rows,
            "tokens": shape.context_length,
        }
        if row.get("samples_ms"):
            ms, (low, _, high) = median(row["samples_ms"]), quantiles(row["samples_ms"], n=4)
            rate = data.inputs.numel() / ms * 1e3
            ratios = {
                other: ms / median(r["samples_ms"]) for other, r in found.items() if other != variant and "host_ms" in r
            }
            common |= {"ms": ms, "quartiles_ms": [low, high], "tokens_per_second": rate, "ratio_to": ratios}
        rows_of_results.append(common | row)
    return rows_of_results


def report(rows: list[dict]) -> None:
    for row in rows:
        name = f"d{row['depth']:<2} {row['rows']:>2}×{row['tokens']:<4} {row['variant']:<24}"
        if "ms" not in row:
            print(f"{name} {row['note']}", flush=True)
            continue
        low, high = row["quartiles_ms"]
        print(
            f"{name} {row['ms']:8.2f} ms ({low:.2f} to {high:.2f})  host {row['host_ms']:7.2f}  "
            f"{row['tokens_per_second']:9,.0f} tok/s  "
            f"{row['peak_gb']:5.1f} GB  start {row['start_s']:5.1f} s  loss {row['loss']:.4f}"
            + "".join(f"  {r:.3f} × {other}" for other, r in row["ratio_to"].items()),
            flush=True,
        )


def first_step(config: TrainingStepConfig) -> list[dict]:
    """Time each variant at the first given shape in processes of its own: with empty caches, then with those that this leaves."""
    rows = []
    for variant in config.variants:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            for state in ("cold", "warm"):
                arguments = [
                    "--depth",
                    str(config.depth[0]),
                    "--rows",
                    str(config.rows[0]),
                    "--tokens",
                    str(config.tokens[0]),
                ]
                command = [
                    sys.executable,
                    "-m",
                    "bench.training_step",
                    *arguments,
                    "--variants",
                    variant,
                    "--rounds",
                    "-1",
                ]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | caches)
                if done.returncode:
                    raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
                rows.append({"variant": variant, "caches": state} | json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    return rows


def one_first_step(config: TrainingStepConfig, device: torch.device) -> dict:
    """Return the seconds that the first micro-steps and updates of this process take."""
    shape = GPTConfig.from_depth(config.depth[0], config.vocab_size, config.tokens[0])
    data, step = random_batch(shape, config.rows[0]), prepare(config.variants[0], shape, device)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {"micro_step_s": [], "update_s": []}
    for _ in range(4):
        for name in times:
            started = time.perf_counter()
            if name == "micro_step_s":
                step(data, 1.0)
            else:
                step.optimizer.synchronize()
                step.optimizer.update(1.0, 0.9)
            torch.cuda.synchronize()
            times[name].append(round(time.perf_counter() - started, 3))
    return times


def main(config: TrainingStepConfig) -> None:
    with start_runtime("cuda") as runtime:
        if config.rounds < 0:
            print(json.dumps(one_first_step(config, runtime.device)))
            return
        found = header(f"python -m bench.training_step {' '.join(sys.argv[1:])}".strip())
        if config.first_step:
            found["rows"] = first_step(config)
        for depth, rows, tokens in () if config.first_step else product(config.depth, config.rows, config.tokens):
            shape = GPTConfig.from_depth(depth, config.vocab_size, tokens)
            results = measure(replace(shape, depth=config.layers or depth), rows, config, runtime.device)
            report(results)
            found["rows"] += results
            torch._dynamo.reset()
            if config.json:  # after each shape, so that an interrupted run keeps its results
                write_json(config.json, found)
        if config.json:
            write_json(config.json, found)


if __name__ == "__main__":
    try:
        main(tyro.cli(TrainingStepConfig))
    except UserError as error:  # no GPU here
        sys.exit(f"bench.training_step: {error}")
