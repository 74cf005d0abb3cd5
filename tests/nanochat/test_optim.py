"""Muon and AdamW against their formulas written out, alone and on several processes."""

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kernels import reference
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, OptimizerConfig, muon_momentum

CONFIG = GPTConfig.from_depth(3, 301, 16)  # 301 rows do not divide by 2, nor do 3 matrices of one shape
MOMENTA = (0.85, 0.9, 0.95)


def batch(step: int) -> torch.Tensor:
    return torch.randint(301, (8, 17), generator=torch.Generator().manual_seed(step))


def train(
    rank: int = 0, world_size: int = 1, config: OptimizerConfig | None = None
) -> tuple[GPT, MuonAdamW, list[float]]:
    """Three steps, each rank on its share of the rows."""
    model = GPT.create(CONFIG)
    optimizer, norms = MuonAdamW(model, config), []
    for step, momentum in enumerate(MOMENTA):
        rows = batch(step)[rank::world_size]
        model(rows[:, :-1], rows[:, 1:]).backward()
        norms.append(optimizer.synchronize().item())
        optimizer.update(1.0 - step / 4, momentum)
    return model, optimizer, norms


def plainly(config: OptimizerConfig) -> GPT:
    """The same three steps from the formulas, parameter by parameter."""
    model = GPT.create(CONFIG)
    state: dict[str, dict] = {}
    for step, momentum in enumerate(MOMENTA):
        rows, lr = batch(step), 1.0 - step / 4
        model.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        clip = min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        with torch.no_grad():
            for name, p in model.named_parameters():
                g, s = p.grad * clip, state.setdefault(name, {"a": torch.zeros_like(p), "b": torch.zeros_like(p)})
                if name.startswith("blocks"):
                    s["a"] = momentum * s["a"] + (1 - momentum) * g
                    x = reference.newton_schulz((1 - momentum) * g + momentum * s["a"])
                    p -= config.matrix_lr * lr * math.sqrt(max(1, p.size(0) / p.size(1))) * x
                else:
                    s["a"], s["b"] = 0.8 * s["a"] + 0.2 * g, 0.95 * s["b"] + 0.05 * g * g
                    mean, variance = s["a"] / (1 - 0.8 ** (step + 1)), s["b"] / (1 - 0.95 ** (step + 1))
                    base = config.head_lr if name.startswith("head") else config.embedding_lr
                    p -= base * (CONFIG.width / 768) ** -0.5 * lr * mean / (variance.sqrt() + 1e-10)
    return model


@pytest.mark.parametrize("clip", [1.0, 0.05, 0.0])
def test_the_update_is_that_of_the_formulas(clip):
    config = OptimizerConfig(grad_clip=clip)
    model, _, norms = train(config=config)
    assert min(norms) > 0.05  # so that the small limit really clips
    for (name, a), b in zip(model.named_parameters(), plainly(config).parameters(), strict=True):
        # where a gradient is nearly zero, AdamW's eps of 1e-10 makes much of its rounding
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worker(rank: int, world_size: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    model, optimizer, norms = train(rank, world_size)
    state = {name: share.clone() for name, share, _ in optimizer.named_state()}
    torch.save({"model": model.state_dict(), "state": state, "norms": norms}, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_make_the_parameters_of_one(world_size, tmp_path):
    mp.spawn(worker, (world_size, free_port(), str(tmp_path)), nprocs=world_size)
    model, optimizer, norms = train()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        for name, parameter in model.named_parameters():
            assert torch.equal(rank["model"][name], ranks[0]["model"][name])
            torch.testing.assert_close(rank["model"][name], parameter.detach(), rtol=1e-3, atol=2e-4)
    for name, whole, rows in optimizer.named_state():  # the shares make the whole, and no rank holds more than its own
        shares = [rank["state"][name] for rank in ranks if name in rank["state"]]
        torch.testing.assert_close(torch.cat(shares) if rows else shares[0], whole, rtol=1e-3, atol=1e-6)
        assert max(len(share) for share in shares) == -(-rows // world_size) if rows else len(shares) == 1


def test_momentum_rises_over_300_steps():
    assert [round(muon_momentum(s), 3) for s in (0, 150, 300, 9999)] == [0.85, 0.9, 0.95, 0.95]


def test_a_matrix_without_gradient_stays():
    model = GPT.create(CONFIG)
    optimizer = MuonAdamW(model)
    rows = batch(0)
    model(rows[:, :-1], rows[:, 1:]).backward()
    query = model.blocks[0].attention.query.weight
    before, query.grad = query.detach().clone(), None
    optimizer.synchronize()
    optimizer.update(1.0, 0.9)
    assert torch.equal(query, before)
