"""Muon for the matrices of the blocks, AdamW for embedding and head; one process or many.

Parameters are gathered in groups whose items can be dealt out to ranks: the matrices of one shape (an item is a matrix),
or the rows of an embedding (an item is a row). The items of a group lie in one buffer, of which the parameters become views,
and so do their gradients: a group is one batch for every kernel and one message for every exchange. A step
reduce-scatters each group's gradient, so that a rank holds the mean gradient of the items it owns, clips by the
global norm (for which all of them must have arrived), and updates its items with optimizer state that exists only
there. Of AdamW's groups the new weights and then Muon's updates are all-gathered while the next group is orthogonalised.
State is float32.

Nothing waits for the host, and what changes from step to step lies on the device: a whole step can be captured in a CUDA
graph, and with `graphs` the work between exchanges is replayed from such.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPT, Linear
from nanochat.graphs import Replayed

# torch 2.13 renamed these and warns at the old names
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates of the three kinds of weights and the gradient's limit."""

    matrix_lr: float = 0.02
    """learning rate of Muon, for the matrices of the blocks"""
    embedding_lr: float = 0.2
    """learning rate of AdamW for the embedding, at width 768 (scaled by (width/768)^-1/2)"""
    head_lr: float = 0.004
    """learning rate of AdamW for the head, at width 768 (scaled by (width/768)^-1/2)"""
    grad_clip: float = 1.0
    """largest global norm of the gradient; 0 leaves it as it is"""


class Group:
    """Parameters updated alike, cut into items: rank r owns `counts[r]` of them, and the place of `per_rank` in the buffer."""

    def __init__(self, name: str, parameters: list[Tensor], lr: float, counts: list[int], rank: int):
        self.name, self.parameters, self.lr = name, parameters, lr
        self.stacked = name.startswith("muon")
        shape = parameters[0].shape
        self.item_shape = shape if self.stacked else shape[1:]
        self.items, self.per_rank, self.owned = sum(counts), max(counts), counts[rank]
        self.first = sum(counts[:rank])  # of its items, and where they begin in the buffer
        self.mine = slice(rank * self.per_rank, rank * self.per_rank + self.owned)
        size = (self.per_rank * len(counts), *self.item_shape)
        self.weights = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
        self.gradients = torch.zeros_like(self.weights)
        # a rank's place of the gradient after the exchange; alone, the gradient itself
        self.share = self.gradients if len(counts) == 1 else torch.zeros_like(self.weights[: self.per_rank])
        self.places = [r * self.per_rank + i for r, count in enumerate(counts) for i in range(count)]
        self.views = self._cut(self.gradients)
        for parameter, view, gradient in zip(parameters, self._cut(self.weights), self.views, strict=True):
            parameter.data = view.copy_(parameter.data)
            parameter.grad = gradient
        self.copies: Tensor | None = None
        state = ("momentum",) if self.stacked else ("mean", "variance")
        self.state = {n: torch.zeros(self.owned, *self.item_shape, device=self.weights.device) for n in state}

    def _cut(self, buffer: Tensor) -> list[Tensor]:
        """What belongs to each parameter."""
        return [buffer[i] for i in self.places] if self.stacked else [buffer[: self.items]]

    def keep_copies(self, layers: list[Linear], dtype: torch.dtype) -> None:
        """Have a copy of the weights in the dtype of computation, which the layers take instead of casting theirs."""
        self.copies = self.weights.to(dtype)
        for layer, view in zip(layers, self._cut(self.copies), strict=True):
            layer.copy = view

    def keep_gradients(self, layers: list[Linear]) -> None:
        """Have the layers add their gradients to the buffer themselves, in float32, and not through autograd."""
        for layer, view in zip(layers, self.views, strict=True):
            layer.gradient = view

    def take(self, weights: Tensor) -> None:
        """Have these weights, and the copy of them."""
        if weights is not self.weights:
            self.weights.copy_(weights)
        if self.copies is not None:
            self.copies.copy_(weights)

    def collect(self) -> None:
        """Have every gradient in the buffer; a parameter without one counts as zero."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            parameter.grad = view


class MuonAdamW:
    """The optimizer of a GPT, whose parameters it moves into buffers of its own, as views.

    Call `synchronize()` after the backward pass of a step (on every rank; it returns the global gradient norm, a
    float32 scalar tensor), then `update(...)`. graphs: replay CUDA graphs, with fused kernels on CUDA.
    Keller Jordan et al. 2024 (Muon), Loshchilov and Hutter 2019 (AdamW).
    """

    ADAM_BETAS, ADAM_EPS, NEWTON_SCHULZ_STEPS = (0.8, 0.95), 1e-10, 5

    def __init__(self, model: GPT, config: OptimizerConfig | None = None, graphs: bool = True):
        self.config = config or OptimizerConfig()
        self.impl = model.config.impl.newton_schulz
        self.steps = 0
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        # bf16 halves the products on a GPU; a CPU is no faster with it
        self.update_dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        by_shape = defaultdict(list)
        for parameter in model.blocks.parameters():
            by_shape[tuple(parameter.shape)].append(parameter)
        owners = deal({shape: len(parameters) for shape, parameters in by_shape.items()}, self.world_size)
        width_scale = (model.config.width / 768) ** -0.5
        self.groups = [
            Group(f"muon-{m}x{n}", parameters, self.config.matrix_lr, owners[m, n], self.rank)
            for (m, n), parameters in sorted(by_shape.items())
        ]
        for name, lr in (("embedding", self.config.embedding_lr), ("head", self.config.head_lr)):
            parameter = getattr(model, name).weight
            rows = -(-parameter.size(0) // self.world_size)  # in equal runs, so that they lie one after the other
            counts = [min(rows, max(0, parameter.size(0) - r * rows)) for r in range(self.world_size)]
            self.groups.append(Group(f"adamw-{name}", [parameter], lr * width_scale, counts, self.rank))
        if model.compute_dtype != torch.float32:
            for group, layers in self._layers(model):
                group.keep_copies(layers, model.compute_dtype)
        scalars = torch.ones(5, device=model.device)
        self.clip, self.rate, self.momentum, *_ = scalars
        self.biases = scalars[3:]
        graphs = graphs and model.device.type == "cuda" and self.impl != "reference"
        pool = torch.cuda.graph_pool_handle() if graphs else None
        self._measured = Replayed(self._measure, pool)
        self._moved = {
            group.name: Replayed(partial(self._direction if group.stacked else self._adamw, group), pool)
            for group in self.groups
        }
        self._alone = Replayed(self._update_alone, pool)

    def _layers(self, model: GPT) -> Iterator[tuple[Group, list[Linear]]]:
        """The groups of matrices, each with the layers that they belong to."""
        layers = {layer.weight: layer for layer in model.modules() if isinstance(layer, Linear)}
        for group in self.groups:
            if group.parameters[0] in layers:
                yield group, [layers[parameter] for parameter in group.parameters]

    def keep_gradients(self, model: GPT) -> None:
        """From now on the model's backward adds the gradients of matrices to the groups' buffers itself: in float32, in place,
        without a pass of autograd's. For code that calls backward once for each forward, as training does."""
        for group, layers in self._layers(model):
            group.keep_gradients(layers)

    @torch.no_grad()
    def synchronize(self) -> Tensor:
        """Average the gradient over ranks, keep the owned share of it, and return its global norm."""
        for group in self.groups:
            group.collect()
        if self.world_size == 1:
            squares = self._measured()
        else:
            pending = [
                _reduce_scatter(group.share, group.gradients, op=dist.ReduceOp.AVG, async_op=True)
                for group in self.groups
            ]
            parts = []
            for group, work in zip(self.groups, pending, strict=True):  # one is summed while the next arrives
                work.wait()
                parts.append(square_sum(group.share[: group.owned]))
            squares = torch.stack(parts).sum()
            dist.all_reduce(squares)
        self.norm = squares.sqrt()
        if self.config.grad_clip > 0:
            self.clip.copy_((self.config.grad_clip / (self.norm + 1e-6)).clamp(max=1.0))
        return self.norm

    def _measure(self) -> Tensor:
        return torch.stack([square_sum(group.share) for group in self.groups]).sum()

    @torch.no_grad()
    def update(self, lr_multiplier: float, momentum: float) -> None:
        """Move the weights by the synchronised gradient and forget it."""
        self.schedule(lr_multiplier, momentum)
        self.move()

    def schedule(self, lr_multiplier: float, momentum: float) -> None:
        """Begin a step: what it needs to know goes to the device, outside of any graph that `move` is captured in."""
        self.steps += 1
        self.rate.fill_(lr_multiplier), self.momentum.fill_(momentum)
        for bias, beta in zip(self.biases, self.ADAM_BETAS, strict=True):
            bias.fill_(1 - beta**self.steps)

    @torch.no_grad()
    def move(self) -> None:
        """The rest of `update`."""
        if self.world_size == 1:
            self._alone()
        else:
            # the embeddings' weights, which are quickly made, travel while the matrices are orthogonalised
            order = sorted(self.groups, key=lambda group: group.stacked)
            gathers = [(group, *self._gather(group, self._moved[group.name]())) for group in order]
            for group, gathered, work in gathers:
                work.wait()
                self._apply(group, gathered) if group.stacked else group.take(gathered)
        for group in self.groups:
            group.gradients.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights anew, after something other than a step changed them."""
        for group in self.groups:
            group.take(group.weights)

    def _update_alone(self) -> None:
        for group in self.groups:
            if group.stacked:
                self._apply(group, self._direction(group))
            else:
                self._adamw(group)

    def _direction(self, group: Group) -> Tensor:
        """Muon's update of the owned matrices."""
        gradient, buffer = group.share[: group.owned], group.state["momentum"]
        nesterov, squares = kernels.nesterov_momentum(
            gradient, buffer, self.clip, self.momentum, self.update_dtype, impl=self.impl
        )
        if self.impl == "reference":  # a matrix after the other, as Muon is commonly written
            parts = [kernels.newton_schulz(x, self.NEWTON_SCHULZ_STEPS, impl=self.impl) for x in nesterov]
            return torch.stack(parts) if parts else nesterov
        return kernels.newton_schulz(nesterov, self.NEWTON_SCHULZ_STEPS, squares=squares, impl=self.impl)

    def _apply(self, group: Group, update: Tensor) -> None:
        factor = group.lr * math.sqrt(max(1, group.item_shape[0] / group.item_shape[1]))
        kernels.apply_update(group.weights, update.contiguous(), self.rate, factor, group.copies, impl=self.impl)

    def _adamw(self, group: Group) -> Tensor:
        """The owned rows, updated."""
        weights, gradient = group.weights[group.mine], group.share[: group.owned]
        kernels.adamw(
            weights, gradient, group.state["mean"], group.state["variance"], self.clip, self.rate, self.biases,
            group.lr, self.ADAM_BETAS, self.ADAM_EPS, None if group.copies is None else group.copies[group.mine],
            impl=self.impl,
        )  # fmt: skip
        return weights

    def _gather(self, group: Group, part: Tensor) -> tuple[Tensor, dist.Work]:
        """The parts of all ranks, each in its place; they arrive while the next group is worked on."""
        padded = part.new_zeros(group.per_rank, *group.item_shape)
        padded[: group.owned] = part
        full = part.new_empty(group.weights.shape)
        return full, _all_gather(full, padded, async_op=True)

    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """(name, tensor, rows of the whole) of the state of this rank, for a checkpoint: a matrix of Muon's is whole (None),
        of an embedding's this is the part of its rows that is owned."""
        for group in self.groups:
            for name, tensor in group.state.items():
                if group.stacked:
                    for i, matrix in enumerate(tensor, group.first):
                        yield f"{group.name}.{name}.{i}", matrix, None
                else:
                    yield f"{group.name}.{name}", tensor, group.items


def square_sum(x: Tensor) -> Tensor:
    if x.device.type == "cuda":
        return torch.linalg.vector_norm(x).square()  # one pass
    return x.square().sum()  # which torch sums pairwise on a CPU, as it does not in a norm


def deal(groups: dict[tuple[int, int], int], world_size: int) -> dict[tuple[int, int], list[int]]:
    """How many matrices of each shape each rank orthogonalises: as many as any other or one more, the ones more where least
    is to be done. groups: shape → number of matrices."""
    load = [0] * world_size
    counts = {}
    for (m, n), items in sorted(groups.items(), key=lambda item: (-(min(item[0]) ** 2) * max(item[0]), item[0])):
        base, more = divmod(items, world_size)
        chosen = sorted(range(world_size), key=lambda r: (load[r], r))[:more]
        counts[m, n] = [base + (r in chosen) for r in range(world_size)]
        load = [done + count * min(m, n) ** 2 * max(m, n) for done, count in zip(load, counts[m, n], strict=True)]
    return counts


def muon_momentum(step: int) -> float:
    """0.85 rising to 0.95 over the first 300 steps."""
    return 0.85 + 0.1 * min(step / 300, 1.0)
