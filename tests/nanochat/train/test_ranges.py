"""With --nvtx the parts of training have names for a profiler; the losses stay the same."""

import json

import pytest
from torch.profiler import ProfilerActivity, profile

from nanochat.options.train import RunOptions, TrainBaseOptions
from nanochat.platform.paths import Paths
from nanochat.train.pretrain import pretrain

PARTS = {
    "train base", "step", "micro-step", "layer 0", "self_attention", "relu2_mlp", "linear_cross_entropy",
    "synchronize gradients", "update weights", "newton_schulz", "adamw", "evaluate", "save",
}  # fmt: skip


@pytest.mark.parametrize("nvtx", [False, True])
def test_parts_of_training(base, tmp_path, cpu, nvtx):
    options = TrainBaseOptions(
        depth=1, context_length=16, num_iterations=2, device_batch_size=2, total_batch_size=64, eval_every=0, eval_tokens=64,
        core_metric_every=-1, sample_every=-1, run=RunOptions(device="cpu", nvtx=nvtx),
    )  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        results = pretrain(options, Paths(base), cpu)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert (names & PARTS) == (PARTS if nvtx else set())
    assert results["steps"] == 2 and results["loss"] > 1
