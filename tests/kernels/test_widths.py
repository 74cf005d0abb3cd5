"""Every operation with its trials of the gate at the widths of all models, on a GPU."""

from dataclasses import replace

import pytest
import torch

from nanochat_kernels import gate
from nanochat_kernels.dispatch import operations
from nanochat_kernels.operation import RunShape
from tests.kernels.harness import DEVICE, GPU


@pytest.mark.skipif(not GPU, reason="wide matrices")
@pytest.mark.parametrize("name", [name for name, operation in operations().items() if operation.trials])
@pytest.mark.parametrize("tokens", [1024, 1001])
@pytest.mark.parametrize("depth", [4, 12, 20, 26, 32])
def test_every_implementation_is_right_at_the_widths_of_models(name, tokens, depth):
    """Whole tiles with as many heads of keys as of queries, ragged ones with one; an implementation may refuse what it cannot do."""
    heads = max(2, depth // 2)
    shape = RunShape(1, tokens, 128 * heads, heads, heads if tokens == 1024 else 1, vocab=65_536, depth=depth)
    operation = operations()[name]
    refused, trials = (
        0,
        [replace(trial, timed=False) for trial in operation.trials(shape, torch.device(DEVICE), torch.bfloat16)],
    )
    for trial in trials:
        _, failures, _ = gate.tried(operation, [trial])
        assert not {impl: wrong for impl, wrong in failures.items() if "KernelRequestError" not in wrong}
        refused += "triton" in failures
    assert refused < len(trials)
