"""Ranges: what is named while they are recorded, and that nothing is while they are not."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import nanochat_kernels as kernels
from nanochat_kernels import ranges


def names_of(path, run) -> list[str]:
    """The names of the ranges that torch.profiler sees while a function runs, in the order of their starts."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(events, key=lambda event: event["ts"])]


def run_with(path, run, **options):
    def inside():
        with ranges.recorded(**options):
            run()

    return names_of(path, inside)


def work() -> torch.Tensor:
    with ranges.span("outer"):
        return kernels.rms_norm(torch.ones(2, 8))


def test_nothing_is_named_unless_it_is_recorded(tmp_path):
    assert names_of(tmp_path / "off.json", work) == []
    assert ranges.span("outer") is ranges.span("other")  # nothing is made
    assert run_with(tmp_path / "on.json", work) == ["outer", "rms_norm"]
    assert names_of(tmp_path / "off.json", work) == []


def test_layers_are_numbered_and_their_hooks_removed(tmp_path):
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward() -> None:
        layers[1](layers[0](torch.ones(1, 4)))

    assert run_with(tmp_path / "on.json", forward, layers=layers) == ["layer 0", "layer 1"]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_a_layer_that_fails_closes_its_range(tmp_path):
    layer = nn.Linear(4, 4)

    def forward() -> None:
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, 5))
        with ranges.span("after"):
            pass

    assert run_with(tmp_path / "on.json", forward, layers=[layer]) == ["layer 0", "after"]


def test_calls_of_operations_are_observed():
    seen, x = [], torch.ones(2, 8)
    with ranges.recorded(observe=lambda name, arguments: seen.append((name, arguments))):
        kernels.rms_norm(x, impl="reference")
    kernels.rms_norm(x)
    assert [(name, len(arguments)) for name, arguments in seen] == [("rms_norm", 1)] and seen[0][1][0] is x


def test_an_error_turns_them_off():
    with pytest.raises(ValueError, match="stop"), ranges.recorded():
        raise ValueError("stop")
    assert isinstance(ranges.span("x"), nullcontext)


@pytest.mark.parametrize("on", [False, True])
def test_torch_compile_does_not_see_them(on):
    torch._dynamo.reset()
    layer = nn.Linear(8, 8)

    def model(x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(layer(x), impl="reference")

    x = torch.randn(2, 8)
    with ranges.recorded([layer]) if on else nullcontext():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
