"""Time the start of a run, in processes of its own: python -m bench train --first-step

A process makes the model, then trains four steps of one micro-batch. The first compiles what no cache has, a graph captures in the
second to fourth.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat.platform.console import say
from nanochat.platform.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class FirstStepConfig:
    """Time the first steps of this process, and print them as JSON."""

    variant: str
    depth: int
    rows: int
    tokens: int
    vocab_size: int
    device: str


def first_steps(texts: tuple[str, ...], config) -> Iterator[dict]:
    """Yield the seconds of the first steps of each variant at the first shape: with empty caches, then with those that this leaves.

    config: a TrainConfig. Raises UserError if a process fails.
    """
    for text in texts:
        options = {
            "variant": text, "depth": config.depth[0], "rows": config.rows[0], "tokens": config.tokens[0],
            "vocab-size": config.vocab_size, "device": config.device,
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.first_step"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            for state in ("cold", "warm"):
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | caches, cwd=ROOT)
                seconds = time.perf_counter() - started
                row = {"variant": text, "caches": state, "depth": options["depth"], "rows": options["rows"]}
                if done.returncode:
                    row["note"] = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    say(f"first steps of {text}, {state}: {row['note']}")
                    yield row
                    break
                row |= json.loads(done.stdout.splitlines()[-1]) | {"process_s": seconds}
                say(
                    f"first steps of {text}, caches {state}: model {row['model_s']:.1f} s, first step {row['steps_s'][0]:.1f} s, "
                    f"then {', '.join(f'{s:.2f}' for s in row['steps_s'][1:])} s; the whole process {seconds:.1f} s"
                )
                yield row


def main(config: FirstStepConfig) -> dict:
    from bench.variants import Training
    from nanochat.gpt import GPTConfig
    from nanochat.platform.distributed import start_runtime
    from nanochat.train.timing import random_batch, synchronize

    with start_runtime(config.device) as runtime:
        shape = GPTConfig.from_depth(config.depth, config.vocab_size, config.tokens)
        synchronize(runtime.device)
        times = [time.perf_counter()]
        training = Training(config.variant, shape, runtime.device, runtime.compute_dtype)
        batch = random_batch(shape, config.rows)
        synchronize(runtime.device)
        times.append(time.perf_counter())
        for _ in range(4):
            training.step(batch, 1)
            synchronize(runtime.device)
            times.append(time.perf_counter())
    seconds = [round(end - start, 3) for start, end in zip(times, times[1:], strict=False)]
    return {"model_s": seconds[0], "steps_s": seconds[1:]}


if __name__ == "__main__":
    try:
        print(json.dumps(main(tyro.cli(FirstStepConfig))))
    except UserError as error:
        sys.exit(f"bench.first_step: {error}")
