"""A micro-step in its three ways: the same loss and the same gradients, whatever its rows, its length and its weight."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nanochat.data.batches import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.platform.errors import UserError
from nanochat.train.micro_step import MicroStep, choose_execution, fusable_options
from tests.processes import spawn

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CONFIG = GPTConfig.from_depth(2, 301, 200)
# on two processes the matrices of one shape begin with the second one; keys and values are shared by heads, the MLP computes again
THREE_BLOCKS = GPTConfig(3, 128, 4, 2, 301, 200, recompute=("mlp",))


def batch(rows: int, length: int, seed: int) -> Batch:
    tokens = torch.randint(301, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, : length // 2] = -1
    return Batch(tokens[:, :-1].contiguous(), targets, ())


def made(
    execution: str, dtype: torch.dtype = torch.float32, device: str = DEVICE, config: GPTConfig = CONFIG
) -> tuple[MicroStep, MuonAdamW]:
    model = GPT.create(config, device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=torch.Generator(device).manual_seed(3))
    optimizer = MuonAdamW(model)
    return MicroStep(model, optimizer, execution, one_length=False), optimizer


def run(execution: str, batches: list[Batch], dtype: torch.dtype = torch.float32) -> tuple[float, list[torch.Tensor]]:
    """The summed loss and all gradients."""
    step, optimizer = made(execution, dtype)
    for number, one in enumerate(batches):
        step(one, 0.5 + number)
    optimizer.synchronize()
    return step.loss.item(), [group.gradients.clone() for group in optimizer.groups]


def exchanging_worker(rank: int, world_size: int, port: int, path: str, device: str) -> None:
    """Train some steps whose last micro-step exchanges; save the weights, what was on its way when backward ended, the blocks of
    each matrix, and for each exchange the group, the chunk and the block whose backward ended last (or, of the head, their number).
    """
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    step, optimizer = made("graph", device=device, config=THREE_BLOCKS)
    step.exchanges = True
    on_their_way, rest = [], optimizer._exchange_rest
    ended, starts, blocks = [], [], list(step.model.blocks)

    def note(x: torch.Tensor, number: int) -> None:
        x.register_hook(lambda _: ended.append(number))

    # these hooks come before those of `exchanging`, which are made later
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, inputs, number=number: note(inputs[0], number))
    blocks[-1].register_forward_hook(lambda _, inputs, outputs: note(outputs[0], len(blocks)))

    def exchange(group, chunk: int) -> None:
        if chunk not in group.exchanges:
            starts.append((group.name, chunk, ended[-1]))
        type(group).exchange(group, chunk)

    for group in optimizer.groups:
        group.exchange = partial(exchange, group)

    def exchange_rest() -> None:
        on_their_way.append({group.name: sorted(group.exchanges) for group in optimizer.groups})
        rest()

    optimizer._exchange_rest = exchange_rest
    norms = train(step, optimizer, rank, world_size)
    shifts = [group.shift for group in optimizer.matrix_groups]
    block_of = {p: number for number, block in enumerate(blocks) for p in block.parameters()}
    owners = {group.name: [block_of[p] for p in group.parameters] for group in optimizer.matrix_groups}
    torch.save((step.model.state_dict(), norms, on_their_way, shifts, starts, owners), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def train(step: MicroStep, optimizer: MuonAdamW, rank: int = 0, world_size: int = 1) -> list[float]:
    """Steps of eight batches, of which each process computes its share; returns the gradient norms."""
    norms = []
    for number in range(4):
        mine = [batch(2, 200, 8 * number + i) for i in range(8)][rank::world_size]
        for i, one in enumerate(mine, 1):
            step(one, world_size / 8, last=i == len(mine))
        norms.append(float(optimizer.synchronize()))
        optimizer.update(1.0, 0.9)
    return norms


@pytest.mark.parametrize(
    ("execution", "of", "early"), [("graph", "sm80", True), ("graph", "sm90", False), ("eager", "sm80", False)]
)
def test_gradients_are_exchanged_early_where_that_is_faster(monkeypatch, execution, of, early):
    monkeypatch.setattr("nanochat.train.micro_step.architecture.architecture", lambda _: of)
    model, optimizer = (
        SimpleNamespace(device=torch.device("cpu")),
        SimpleNamespace(world_size=2, keep_gradients=lambda _: None),
    )
    step = MicroStep(model, optimizer, execution, one_length=True)
    assert step.exchanges == early and step.can_exchange == (execution == "graph")


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")


@pytest.mark.parametrize("world_size, device", [(2, "cpu"), (3, "cpu"), pytest.param(2, "cuda", marks=two_gpus)])
def test_gradients_are_exchanged_while_backward_runs(world_size, device, tmp_path):
    """The steps are those of one process. A chunk of matrices is on its way as soon as backward has passed the block of its lowest
    one, the head's at once, and the embedding's at the end."""
    spawn(exchanging_worker, world_size, str(tmp_path), device)
    step, optimizer = made("graph", device=device, config=THREE_BLOCKS)
    norms = train(step, optimizer)
    for rank in range(world_size):
        weights, found, on_their_way, shifts, starts, owners = torch.load(tmp_path / f"{rank}.pt", map_location=device)
        assert any(shifts) == (world_size == 2)
        assert found == pytest.approx(norms, rel=1e-4 if device == "cpu" else 1e-2)
        for name, weight in step.model.state_dict().items():
            # a gradient that is only rounding moves a weight of AdamW as far as any other
            difference = (weights[name] - weight).norm()
            assert difference <= (2e-3 if device == "cpu" else 2e-2) * weight.norm(), (name, float(difference))
        # on a GPU the first step runs and the second is captured; the others are replayed
        assert len(on_their_way) == (2 if device == "cuda" else 4)
        for group in optimizer.groups:
            chunks = -(-group.items // world_size) if group.name.startswith("muon") else 1
            wanted = [] if "embedding" in group.name else list(range(chunks))
            assert all(seen[group.name] == wanted for seen in on_their_way), (group.name, on_their_way)
        first_items = {
            g.name: range(-shift, g.items, world_size) for g, shift in zip(optimizer.matrix_groups, shifts, strict=True)
        }
        wanted = {
            (name, chunk): owners[name][max(0, item)]
            for name, items in first_items.items()
            for chunk, item in enumerate(items)
        }
        wanted |= {("adamw-head", 0): len(step.model.blocks), ("adamw-embedding", 0): 0}
        assert len(starts) == len(wanted) * len(on_their_way) and {0, 1, 3} <= set(wanted.values())
        assert {(name, chunk): ended for name, chunk, ended in starts} == wanted


def test_each_micro_step_says_whether_it_has_exchanged_the_gradients(monkeypatch):
    """A step after one that exchanged early exchanges its own gradients, whatever its execution."""
    step, optimizer = made("graph")
    monkeypatch.setattr(step, "exchanges", True)
    monkeypatch.setattr(step, "_run", lambda *_: None)
    eager = MicroStep(step.model, optimizer, "eager", one_length=False)
    for call, last, expected in (
        (step, False, False),
        (step, True, True),
        (step, False, False),
        (step, True, True),
        (eager, True, False),
    ):
        call(batch(2, 100, 0), 1.0, last=last)
        assert optimizer.exchanged == expected


def test_an_error_leaves_no_exchange_behind(monkeypatch):
    """What is repeated after memory ran out exchanges its own gradients."""
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    step, optimizer = made("graph")
    started = []
    for group in optimizer.groups:
        monkeypatch.setattr(
            group, "exchange", lambda chunk, group=group: started.append(group.exchanges.setdefault(chunk))
        )
    with pytest.raises(torch.OutOfMemoryError), optimizer.exchanging(step.model):
        step(batch(2, 200, 1), 1.0)
        raise torch.OutOfMemoryError("no memory")
    assert started and not any(group.exchanges for group in optimizer.groups)


@pytest.mark.parametrize("lengths", [(200,), (200, 200, 200, 200), (3, 128, 130, 3, 130, 3)])
def test_static_buffers_and_float32_accumulation_give_what_autograd_gives(lengths):
    batches = [batch(2, length, seed) for seed, length in enumerate(lengths)]
    (loss, gradients), (plain_loss, plain) = run("graph", batches), run("eager", batches)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for a, b in zip(gradients, plain, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_the_weights_of_tokens_are_copied_too_and_others_stay_without():
    """Also of a shorter batch, whose padding has no weight, and with a batch without weights in between."""
    batches = []
    for seed, (length, weighted) in enumerate([(200, True), (100, True), (200, False), (130, True), (200, True)]):
        one = batch(2, length, seed)
        factor = torch.randn(2, length, generator=torch.Generator().manual_seed(seed)) if weighted else None
        batches.append(replace(one, loss_weight=factor))
    (loss, gradients), (plain_loss, plain) = run("graph", batches), run("eager", batches)
    unweighted, _ = run("eager", [replace(one, loss_weight=None) for one in batches])
    assert loss == pytest.approx(plain_loss, rel=1e-4) and abs(loss - unweighted) > 1
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_a_row_of_another_length_leaves_nothing_behind():
    """The buffers of a length class hold the tokens of the batch before, which must not count."""
    short = batch(2, 5, 1)
    step, optimizer = made("graph")
    step(batch(2, 100, 0), 1.0)
    for group in optimizer.groups:
        group.gradients.zero_()
    step.loss.zero_()
    step(short, 1.0)
    alone, other = made("graph")
    alone(short, 1.0)
    assert step.loss.item() == alone.loss.item()
    for a, b in zip(optimizer.groups, other.groups, strict=True):
        torch.testing.assert_close(a.gradients, b.gradients)


@pytest.mark.parametrize("shapes", [[(2, 100), (1, 100)], [(2, 200), (2, CONFIG.context_length + 1)]])
def test_batches_of_other_rows_and_lengths(shapes):
    """Fewer rows than the batch before, and rows that are longer than the context: each as in a run of its own."""
    batches = [batch(rows, length, seed) for seed, (rows, length) in enumerate(shapes)]
    (loss, gradients), (plain_loss, plain) = run("graph", batches), run("eager", batches)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_gradients_that_backward_has_added_are_kept_when_grad_is_none():
    step, optimizer = made("graph")
    step.model.zero_grad(set_to_none=True)
    step(batch(2, 100, 0), 1.0)
    assert optimizer.synchronize() > 0 and all(group.gradients.any() for group in optimizer.matrix_groups)


def test_a_second_optimizer_takes_the_gradients_over():
    step, _ = made("graph")
    second = MuonAdamW(step.model)
    MicroStep(step.model, second, "eager", one_length=False)(batch(2, 100, 0), 1.0)
    assert all(group.gradients.any() for group in second.groups)


def test_the_sum_in_float32_is_not_rounded_to_the_compute_dtype():
    """256 small gradients added to a large one: bfloat16 would lose each of them."""
    batches = [batch(2, 128, 0)] + [batch(2, 128, 1)] * 3
    _, gradients = run("graph", batches, torch.bfloat16)
    _, first = run("graph", batches[:1], torch.bfloat16)
    muon = max(range(len(gradients)), key=lambda i: gradients[i].dim())
    assert gradients[muon].dtype == torch.float32
    rounded = gradients[muon].bfloat16().float()
    assert (gradients[muon] != rounded).float().mean() > 0.5 and not torch.equal(gradients[muon], first[muon])


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_replayed_micro_step_is_the_launched_one_bit_for_bit():
    """Without graphs the very same work runs; six micro-steps of two shapes, of which the later ones are replayed."""
    batches = [batch(2, length, seed) for seed, length in enumerate((200, 100, 200, 100, 200, 100))]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss, gradients = run("graph", batches, torch.bfloat16)
        step, optimizer = made("graph", torch.bfloat16)
        step.pool = None
        for number, one in enumerate(batches):
            step(one, 0.5 + number)
        optimizer.synchronize()
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss == step.loss.item()
    for a, group in zip(gradients, optimizer.groups, strict=True):
        assert torch.equal(a, group.gradients)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_the_optimizer_s_update_reaches_the_next_replay():
    """Weights, and their copies, change in place between replays: the loss falls on one batch."""
    step, optimizer = made("graph", torch.bfloat16)
    losses, one = [], batch(2, 200, 0)
    for _ in range(12):
        step.loss.zero_()
        step(one, 1.0)
        losses.append(step.loss.item())
        optimizer.synchronize()
        optimizer.update(1.0, 0.9)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_nan_reaches_loss_and_norm():
    step, optimizer = made("graph", torch.bfloat16)
    for number in range(3):
        if number == 2:
            with torch.no_grad():
                step.model.blocks[0].mlp.expand.weight[0, 0] = float("nan")
                optimizer.refresh()
        step.loss.zero_()
        step(batch(2, 200, number), 1.0)
    assert step.loss.isnan() and optimizer.synchronize().isnan()


def test_the_options_that_a_graph_needs_fused_are_those_with_a_fused_implementation():
    options = {"rms_norm", "self_attention", "qkv_projection", "output_projection", "relu2_mlp", "linear_cross_entropy"}
    assert set(fusable_options()) == options


def test_execution():
    assert choose_execution("auto", torch.device("cuda", 0), Implementations())[0] == "graph"
    plain = choose_execution("auto", torch.device("cuda", 0), Implementations(relu2_mlp="reference"))
    assert plain[0] == "compile" and "relu2_mlp" in plain[1]
    assert choose_execution("auto", torch.device("cpu"), Implementations())[0] == "eager"
    measured = {"graph": 2.0, "compile": 1.5}
    fastest, why = choose_execution("auto", torch.device("cuda", 0), Implementations(), measured)
    assert fastest == "compile" and why == "the gate measured compile 1.50 ms, graph 2.00 ms"
    assert choose_execution("graph", torch.device("cuda", 0), Implementations(), measured)[0] == "graph"
    assert choose_execution("compile", torch.device("cuda", 0), Implementations())[0] == "compile"
    with pytest.raises(UserError, match="--execution graph replays CUDA graphs, and the device is cpu"):
        choose_execution("graph", torch.device("cpu"), Implementations())
