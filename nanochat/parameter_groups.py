"""The parameters of one kind in one buffer, which the optimizer updates and exchanges together (see optim.py)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import Embedding, Linear

ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10
NEWTON_SCHULZ_STEPS = 5  # each multiplies small singular values by 3.4445, all five by 485

# torch 2.13 renamed it and warns at the old name
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Schedule:
    """The factors that change from step to step: float32 tensors on the device, so that a captured graph reads new values."""

    clip: Tensor  # scalar: factor that brings the norm of the gradient to the limit or below
    rate: Tensor  # scalar: multiplier of all learning rates
    momentum: Tensor  # scalar: momentum of Muon
    biases: Tensor  # (2,): 1 − β₁ᵗ and 1 − β₂ᵗ of AdamW at step t

    @classmethod
    def on(cls, device: torch.device) -> "Schedule":
        values = torch.ones(5, device=device)
        return cls(values[0], values[1], values[2], values[3:])


class Group(ABC):
    """Parameters of one kind, as items of one shape in one buffer.

    The buffer consists of chunks, which ranks exchange one by one. Each chunk has `run` slots for every rank, because the
    collectives exchange equal parts. Item i is in slot i + shift; slots without an item stay zero. `owned` are the numbers of the
    items in this rank's slots.
    """

    state_names: tuple[str, ...]

    def __init__(
        self, name: str, parameters: list[Tensor], item_shape: torch.Size, lr: float, items: int, run: int, shift: int,
        ranks: tuple[int, int],
    ):  # fmt: skip
        self.name, self.parameters, self.item_shape, self.lr = name, parameters, item_shape, lr
        self.items, self.shift, (self.rank, world_size) = items, shift, ranks
        size = -(-(items + shift) // (run * world_size)), world_size, run, *item_shape
        mine = torch.arange(math.prod(size[:3])).view(size[:3])[:, self.rank].flatten() - shift
        is_item = (mine >= 0) & (mine < items)
        self.owned = mine[is_item].tolist()
        first = int(is_item.int().argmax()) if self.owned else 0
        self.owned_slots = slice(first, first + len(self.owned))  # among this rank's slots
        self.weights = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device).flatten(0, 2)
        self.gradients = torch.zeros_like(self.weights)
        self.chunks = self.gradients.view(size)
        # this rank's slots of the gradient after the exchange; with one rank, the gradient itself
        self.reduced = self.chunks[:, 0] if world_size == 1 else torch.zeros_like(self.chunks[:, 0])
        self.exchanges: dict[int, dist.Work] = {}  # of the chunks that are on their way
        self.gradient_views = self.views(self.gradients)
        for parameter, view, gradient in zip(parameters, self.views(self.weights), self.gradient_views, strict=True):
            parameter.data = view.copy_(parameter.data)
            parameter.grad = gradient
        self.copies: Tensor | None = None
        self.gradients_in_place = False  # backward adds to the buffer of gradients and does not touch `.grad`
        self.state = {
            name: torch.zeros(len(self.owned), *item_shape, device=self.weights.device) for name in self.state_names
        }

    @abstractmethod
    def views(self, buffer: Tensor) -> list[Tensor]:
        """The view of a buffer that belongs to each parameter."""

    @property
    def owned_gradient(self) -> Tensor:
        """The mean gradient of the items that this rank owns, after the exchange."""
        return self.reduced.flatten(0, 1)[self.owned_slots]

    def exchange(self, chunk: int) -> None:
        """Start to exchange the gradients of a chunk, unless they are on their way already."""
        if chunk not in self.exchanges:
            part, average = self.chunks[chunk], dist.ReduceOp.AVG
            self.exchanges[chunk] = _reduce_scatter(self.reduced[chunk], part.flatten(0, 1), op=average, async_op=True)

    def arrive(self) -> None:
        """Wait until the gradients of all chunks have arrived, or on a GPU let the work that follows wait."""
        for work in self.exchanges.values():
            work.wait()
        self.exchanges.clear()

    def keep_copies(self, layers: list[Linear], dtype: torch.dtype) -> None:
        """Give the layers a copy of their weights in the compute dtype, which every update renews."""
        self.copies = self.weights.to(dtype)
        for layer, view in zip(layers, self.views(self.copies), strict=True):
            layer.copy = view

    def keep_gradients(self, layers: list[Linear] | list[Embedding]) -> None:
        """Have the layers add their gradients to this group's buffer in backward, in float32, instead of returning them."""
        self.gradients_in_place = True
        for layer, view in zip(layers, self.gradient_views, strict=True):
            layer.gradient = view

    def set_weights(self, weights: Tensor) -> None:
        """Replace the weights, and their copies in the compute dtype."""
        if weights is not self.weights:
            self.weights.copy_(weights)
        if self.copies is not None:
            self.copies.copy_(weights)

    def collect(self) -> None:
        """Copy every gradient into the buffer that is not there already; a parameter without a gradient counts as zero."""
        for parameter, view in zip(self.parameters, self.gradient_views, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            elif parameter.grad is None and not self.gradients_in_place:
                view.zero_()
            parameter.grad = view

    @abstractmethod
    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """The state that this rank holds, as (name, tensor, rows of the whole): None where the tensor is the whole."""


class MatrixGroup(Group):
    """The matrices of one shape, (n, M, N), which Muon updates. An item is a matrix."""

    state_names = ("momentum",)

    def __init__(self, name: str, parameters: list[Tensor], lr: float, shift: int, ranks: tuple[int, int]):
        super().__init__(name, parameters, parameters[0].shape, lr, len(parameters), 1, shift, ranks)

    def views(self, buffer: Tensor) -> list[Tensor]:
        return list(buffer[self.shift : self.shift + self.items])

    def direction(self, schedule: Schedule, dtype: torch.dtype, impl: str) -> Tensor:
        """Muon's update of the owned matrices, (owned, M, N): their Nesterov momentum, orthogonalized in `dtype`."""
        nesterov, squares = kernels.nesterov_momentum(
            self.owned_gradient, self.state["momentum"], schedule.clip, schedule.momentum, dtype, impl=impl
        )
        if impl == "reference":  # one matrix after the other, as Muon is usually written
            parts = [kernels.newton_schulz(x, NEWTON_SCHULZ_STEPS, impl=impl) for x in nesterov]
            return torch.stack(parts) if parts else nesterov
        return kernels.newton_schulz(nesterov, NEWTON_SCHULZ_STEPS, squares=squares, impl=impl)

    def apply(self, update: Tensor, schedule: Schedule, impl: str) -> None:
        """Subtract the updates (n, M, N) of all matrices, scaled by the learning rate."""
        # an orthogonal matrix with M > N scales the root mean square of its input by √(N/M), which the factor undoes
        factor = self.lr * math.sqrt(max(1, self.item_shape[0] / self.item_shape[1]))
        kernels.apply_update(self.weights, update.contiguous(), schedule.rate, factor, self.copies, impl=impl)

    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        for name, tensor in self.state.items():
            for i, matrix in zip(self.owned, tensor, strict=True):
                yield f"{self.name}.{name}.{i}", matrix, None


class RowGroup(Group):
    """The rows of the embedding or of the head, (V, C), which AdamW updates. An item is a row."""

    state_names = ("mean", "variance")

    def __init__(self, name: str, parameter: Tensor, lr: float, ranks: tuple[int, int], weight_decay: float = 0.0):
        self.weight_decay = weight_decay
        run = -(-parameter.size(0) // ranks[1])  # equal runs, so that a rank's rows are contiguous
        super().__init__(name, [parameter], parameter.shape[1:], lr, parameter.size(0), run, 0, ranks)
        self.rows = slice(self.rank * run, self.rank * run + len(self.owned))

    def views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[: self.items]]

    def update(self, schedule: Schedule, impl: str) -> Tensor:
        """Update the owned rows in place, and return them."""
        weights = self.weights[self.rows]
        if self.weight_decay:
            weights.mul_(1 - schedule.rate * (self.lr * self.weight_decay))
        kernels.adamw(
            weights, self.owned_gradient, self.state["mean"], self.state["variance"], schedule.clip, schedule.rate,
            schedule.biases, self.lr, ADAM_BETAS, ADAM_EPS, None if self.copies is None else self.copies[self.rows],
            impl=impl,
        )  # fmt: skip
        return weights

    def named_state(self) -> Iterator[tuple[str, Tensor, int | None]]:
        for name, tensor in self.state.items():
            yield f"{self.name}.{name}", tensor, self.items
