"""Muon and AdamW against their formulas written out, alone and on several processes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.optim import MuonAdamW, assign_matrices
from nanochat.options.model import Implementations
from nanochat.options.train import OptimizerOptions
from nanochat.train.schedules import muon_momentum
from nanochat_kernels import reference
from tests.nanochat.models import MOMENTA, SMALL, rows_of, train_three_steps
from tests.processes import spawn


def plainly(config: OptimizerOptions, gradients: list[dict]) -> GPT:
    """Three steps by these gradients from the formulas, parameter by parameter."""
    model = GPT.create(SMALL)
    state: dict[str, dict] = {}
    for step, (momentum, found) in enumerate(zip(MOMENTA, gradients, strict=True)):
        lr = 1.0 - step / 4
        norm = math.sqrt(sum(g.double().square().sum().item() for g in found.values()))
        clip = min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        with torch.no_grad():
            for name, p in model.named_parameters():
                g, s = found[name] * clip, state.setdefault(name, {"a": torch.zeros_like(p), "b": torch.zeros_like(p)})
                if name.startswith("blocks"):
                    s["a"] = momentum * s["a"] + (1 - momentum) * g
                    x = reference.newton_schulz((1 - momentum) * g + momentum * s["a"])
                    p -= config.matrix_lr * lr * math.sqrt(max(1, p.size(0) / p.size(1))) * x
                else:
                    s["a"], s["b"] = 0.8 * s["a"] + 0.2 * g, 0.95 * s["b"] + 0.05 * g * g
                    mean, variance = s["a"] / (1 - 0.8 ** (step + 1)), s["b"] / (1 - 0.95 ** (step + 1))
                    base = config.head_lr if name.startswith("head") else config.embedding_lr
                    p *= 1 - base * (SMALL.width / 768) ** -0.5 * lr * config.weight_decay
                    p -= base * (SMALL.width / 768) ** -0.5 * lr * mean / (variance.sqrt() + 1e-10)
    return model


@pytest.mark.parametrize(("clip", "decay"), [(1.0, 0.0), (0.05, 0.0), (0.0, 0.0), (0.0, 0.1)])
def test_the_update_is_that_of_the_formulas(clip, decay):
    config = OptimizerOptions(grad_clip=clip, weight_decay=decay)
    gradients: list[dict] = []
    model, _, norms = train_three_steps(config=config, gradients=gradients)
    assert min(norms) > 0.05  # so that the small limit really clips
    for (name, a), b in zip(model.named_parameters(), plainly(config, gradients).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_a_gradient_below_the_limit_is_not_scaled(limit):
    """The updates themselves hardly depend on a factor that never changes."""
    _, optimizer, norms = train_three_steps(config=OptimizerOptions(grad_clip=limit))
    assert 0.05 < norms[-1] < 100
    assert float(optimizer.schedule.clip) == pytest.approx(min(1.0, limit / norms[-1]), rel=1e-5)


def worker(rank: int, world_size: int, port: int, path: str, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    model, optimizer, norms = train_three_steps(rank, world_size, device=device)
    state = {name: share.clone() for name, share, _ in optimizer.named_state()}
    torch.save({"model": model.state_dict(), "state": state, "norms": norms}, f"{path}/{rank}.pt")
    dist.destroy_process_group()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")


@pytest.mark.parametrize("world_size, device", [(2, "cpu"), (4, "cpu"), pytest.param(2, "cuda", marks=two_gpus)])
def test_several_processes_make_the_parameters_of_one(world_size, device, tmp_path):
    spawn(worker, world_size, str(tmp_path), device)
    model, optimizer, norms = train_three_steps(device=device)
    other_model, other_optimizer, _ = train_three_steps(device=device, backwards=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", map_location=device) for rank in range(world_size)]
    state = {name: whole for name, whole, _ in optimizer.named_state()}
    other_state = {name: whole for name, whole, _ in other_optimizer.named_state()}

    def same(ours: torch.Tensor, theirs: torch.Tensor, other: torch.Tensor, moved: bool) -> None:
        if device == "cpu":
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 if moved else 1e-6)
        else:  # orthogonalised in 16 bits, which makes much of rounding: as much as where only the order of sums differs
            assert (ours - theirs).norm() < 2 * (other - theirs).norm() + 1e-6 * theirs.norm()

    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5 if device == "cpu" else 1e-2)
        for (name, parameter), other in zip(model.named_parameters(), other_model.parameters(), strict=True):
            assert torch.equal(rank["model"][name], ranks[0]["model"][name])
            ours, theirs, other = rank["model"][name], parameter.detach(), other.detach()
            variance = state.get(f"adamw-{name.removesuffix('.weight')}.variance")
            if variance is not None:  # AdamW makes as much of a gradient that is only rounding as of any
                sure = (variance == 0) | (variance > 1e-6 * variance.max())
                assert sure.float().mean() > 0.9
                ours, theirs, other = ours[sure], theirs[sure], other[sure]
            same(ours, theirs, other, moved=True)
    for name, whole, rows in optimizer.named_state():  # the shares make the whole, and no rank holds more than its own
        shares = [rank["state"][name] for rank in ranks if name in rank["state"]]
        same(torch.cat(shares) if rows else shares[0], whole, other_state[name], moved=False)
        assert max(len(share) for share in shares) == -(-rows // world_size) if rows else len(shares) == 1


def test_momentum_rises_over_300_steps():
    assert [round(muon_momentum(s), 3) for s in (0, 150, 300, 9999)] == [0.85, 0.9, 0.95, 0.95]


def test_a_matrix_without_gradient_stays():
    model = GPT.create(SMALL)
    optimizer = MuonAdamW(model)
    rows = rows_of(0)
    model(rows[:, :-1], rows[:, 1:]).backward()
    query = model.blocks[0].attention.query.weight
    before, query.grad = query.detach().clone(), None
    optimizer.synchronize()
    optimizer.update(1.0, 0.9)
    assert torch.equal(query, before)


def test_owners_have_equal_work():
    """d20 on eight ranks: ten square matrices each, and of the long and the wide ones five together."""

    def counts(items: int, shift: int, ranks: int) -> list[int]:
        return [sum((i + shift) % ranks == r for i in range(items)) for r in range(ranks)]

    groups = {(1280, 1280): 80, (5120, 1280): 20, (1280, 5120): 20}
    shifts = assign_matrices(groups, 8)
    square, long, wide = (counts(items, shifts[shape], 8) for shape, items in groups.items())
    assert square == [10] * 8
    assert [a + b for a, b in zip(long, wide, strict=True)] == [5] * 8
    for items, ranks in ((3, 2), (2, 4), (7, 3), (6, 3)):
        shift = assign_matrices({(8, 8): items}, ranks)[8, 8]
        assert items + shift <= -(-items // ranks) * ranks, "no slot more than needed"


def test_gradients_elsewhere_are_collected():
    """A gradient that autograd or a caller put elsewhere counts as one in the buffer does."""
    moved, left = GPT.create(SMALL), GPT.create(SMALL)
    for model in (moved, left):
        optimizer = MuonAdamW(model)
        for _ in range(2):
            rows = rows_of(0)
            model(rows[:, :-1], rows[:, 1:]).backward()
            if model is moved:
                for parameter in model.parameters():
                    parameter.grad = parameter.grad.clone()
            optimizer.synchronize()
            optimizer.update(1.0, 0.9)
    for a, b in zip(moved.parameters(), left.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_of_the_weights_change_nothing(compiled):
    """Three steps in bfloat16 with the copies that the optimizer keeps and without: the same bits; compiled: the same loss."""
    models, losses = [], []
    for copies in (True, False):
        model = GPT.create(SMALL, compute_dtype=torch.bfloat16)
        optimizer = MuonAdamW(model)
        layer = model.blocks[0].mlp.expand
        assert layer.copy.dtype == torch.bfloat16
        if not copies:
            for part in model.modules():
                if isinstance(part, Linear):
                    part.copy = None
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for step in range(3):
            rows = rows_of(step)
            loss = forward(rows[:, :-1], rows[:, 1:])
            loss.backward()
            losses.append(loss.item())
            optimizer.synchronize()
            optimizer.update(1.0, 0.9)
        if copies:
            assert torch.equal(layer.copy, layer.weight.to(torch.bfloat16)) and layer.copy.abs().sum() > 0
            with torch.no_grad():
                layer.weight.mul_(2)
                optimizer.refresh()
                assert torch.equal(layer.copy, layer.weight.to(torch.bfloat16))
                layer.weight.div_(2)
        models.append(model)
    assert losses[:3] == losses[3:]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and fused kernels need a GPU")
WIDE = GPTConfig.from_depth(4, 512, 128)


def learn(steps: int, impl: str = "triton", graphs: bool = True, whole: bool = False) -> tuple[GPT, list[float]]:
    """A d4 model on sequences whose next token is drawn from four that follow the one before; whole: a step in one graph."""
    config = replace(WIDE, impl=Implementations(optimizer=impl))
    model = GPT.create(config, "cuda", torch.bfloat16)
    optimizer, losses, graph = MuonAdamW(model, graphs=graphs), [], None
    generator = torch.Generator("cuda").manual_seed(0)
    successors = torch.randint(512, (512, 4), device="cuda", generator=generator)
    for step in range(steps):
        tokens = torch.randint(512, (32, 1), device="cuda", generator=generator)
        for _ in range(128):
            choice = torch.randint(4, (32, 1), device="cuda", generator=generator)
            tokens = torch.cat([tokens, successors[tokens[:, -1:], choice]], 1)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        if whole and step >= 2:
            optimizer.begin_step(1.0 - step / steps, 0.9)
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.synchronize()
                    optimizer.update_weights()
            graph.replay()
        else:
            optimizer.synchronize()
            optimizer.update(1.0 - step / steps, 0.9)
    return model, losses


@on_gpu
def test_graphs_change_nothing():
    eager, _ = learn(6, graphs=False)
    for model in (learn(6)[0], learn(6, whole=True)[0]):
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # the backward of the embedding adds in any order


@on_gpu
def test_fused_and_plain_optimizers_reach_the_same_losses():
    """The same curve: 80 steps, to the entropy of four successors."""
    (_, fused), (_, plain) = learn(80), learn(80, "reference")
    assert plain[-1] < 0.5 * plain[0]
    for a, b in zip(fused[::10], plain[::10], strict=True):
        assert a == pytest.approx(b, rel=0.03)
