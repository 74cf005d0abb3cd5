"""Training takes the gate's choice, says so, and refuses one that was made for something else."""

import json

from tests.conftest import TINY_BASE, assert_refused, nanochat

SIZES = "--device cpu --preset cpu --depth 1 --context-length 32 --device-batch-size 4".split()


def test_training_takes_the_gate(base):
    made = nanochat(base, "kernels", "gate", *SIZES)
    assert made.returncode == 0, made.stderr
    found = json.loads((base / "gate.json").read_text())
    assert found["device"] == "cpu" and found["shape"]["vocab"] == 512
    assert "CUDA tensors" in found["operations"]["rms_norm"]["faults"]["triton"]
    run = nanochat(base, "train", "base", *TINY_BASE, "--num-iterations", "2")
    assert run.returncode == 0 and "kernels: the gate of" in run.stdout, run.stderr + run.stdout
    assert "chose fused nothing" in run.stdout
    other = nanochat(base, "train", "base", *TINY_BASE, "--device-batch-size", "8", "--total-batch-size", "256")
    assert_refused(other, "made for another shape", "'rows': 4", "'rows': 8", "nanochat kernels gate, or remove it")
    (base / "gate.json").write_text("{")
    assert_refused(nanochat(base, "train", "base", *TINY_BASE), "is no gate file")
