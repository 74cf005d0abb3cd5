"""Steps for a profiler of NVIDIA's to watch, in a process of their own: between cudaProfilerStart and Stop, with ranges.

nsys profile --capture-range=cudaProfilerApi python -m bench.profiled_steps --depth 20 --rows 16 --tokens 2048
"""

import sys
from dataclasses import dataclass, replace

import torch
import tyro

from bench.trace import STEP
from bench.variants import Training
from nanochat.gpt import GPTConfig
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.train.timing import random_batch, synchronize
from nanochat_kernels.ranges import recorded, span

WARM_UP = 4  # steps; graphs are captured in the second to fourth


@dataclass(frozen=True)
class ProfiledStepsConfig:
    """Train a few steps for a profiler."""

    variant: str = "fused"
    """what to run: a name or EXECUTION:IMPL of python -m bench train"""
    depth: int = 20
    """blocks of the model"""
    rows: int = 16
    """rows of a micro-batch"""
    tokens: int = 2048
    """tokens per row"""
    vocab_size: int = 65536
    """size of the vocabulary"""
    layers: int = 0
    """number of blocks, if it differs from --depth, which still sets the width; 0: as many as --depth"""
    micro_steps: int = 1
    """micro-steps of a step"""
    steps: int = 2
    """steps to profile"""
    launched: bool = False
    """launch every kernel, where training would replay them from CUDA graphs"""
    device: str = "cuda"
    """cuda, or cpu to try the command out"""

    @property
    def shape(self) -> GPTConfig:
        shape = GPTConfig.from_depth(self.depth, self.vocab_size, self.tokens)
        return replace(shape, depth=self.layers or self.depth)


class ProfiledSteps:
    """A variant that is warmed up; `run` trains its steps, each in a range."""

    def __init__(self, config: ProfiledStepsConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device = config, device
        self.batch = random_batch(config.shape, config.rows)
        self.training = Training(config.variant, config.shape, device, dtype, replay=not config.launched)
        for _ in range(WARM_UP):
            self.training.step(self.batch, config.micro_steps)
        synchronize(device)

    def run(self) -> None:
        for number in range(self.config.steps):
            with span(f"{STEP} {number}"):
                self.training.step(self.batch, self.config.micro_steps)
        synchronize(self.device)


def main(config: ProfiledStepsConfig) -> None:
    with start_runtime(config.device) as runtime:
        steps = ProfiledSteps(config, runtime.device, runtime.compute_dtype)
        with recorded(steps.training.model.blocks):
            if runtime.device.type == "cuda":
                torch.cuda.cudart().cudaProfilerStart()
            steps.run()
            if runtime.device.type == "cuda":
                torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    try:
        main(tyro.cli(ProfiledStepsConfig))
    except UserError as error:
        sys.exit(f"bench.profiled_steps: {error}")
