"""Forward and backward of one micro-batch, executed in one of three ways.

graph    The operations are captured in a CUDA graph, once for each shape of a batch, and the graph is replayed. Backward adds
         the gradients to the optimizer's buffers in float32, those of matrices within the products that compute them.
compile  torch.compile; autograd adds the gradients.
eager    The operations run one by one; autograd adds the gradients.

By default CUDA uses what the gate measured to be faster. Without a measurement it uses graph if all operations that can be
fused are, else compile. Every other device uses eager.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial

import torch

import nanochat_kernels as kernels
from nanochat.data.batches import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.options.train import Execution
from nanochat.platform.console import say
from nanochat.platform.cuda_graphs import Replayed
from nanochat.platform.environment import processes_here
from nanochat.platform.errors import UserError
from nanochat_kernels import ahead, architecture, ranges

# Rows are padded to a multiple of this many tokens. At a context of 2048, fine-tuning then needs at most 16 graphs, and with several
# processes as many again for the last micro-step of a step, if that exchanges gradients early.
LENGTH_MULTIPLE = 128
# By architecture, whether gradients are exchanged while the last backward pass runs. On four H200s a step of d20 takes 3.4 ms longer
# that way than with the exchange behind it: sm90's products have a program for each multiprocessor, and probably wait for those that
# the exchange holds.
EXCHANGES_EARLY = {"sm80": True, "sm90": False}


def fusable_options() -> list[str]:
    """The options of the model, without the optimizer's, whose operations are all faster fused than as plain operations."""
    records = kernels.operations()

    def is_fusable(operation: str) -> bool:
        return bool(records[operation].implementations) and not records[operation].fused_by_torch

    names = [field.name for field in fields(Implementations) if field.name != "optimizer"]
    return [name for name in names if all(map(is_fusable, Implementations.operations(name)))]


def choose_execution(
    requested: Execution, device: torch.device, impl: Implementations, measured: Mapping[str, float] | None = None
) -> tuple[str, str]:
    """The execution that `requested` stands for on a device, for a model with these implementations; returns it with the reason.

    measured: the gate's times of a micro-step, in milliseconds by execution; the shortest wins. Raises UserError for a graph
    without CUDA.
    """
    if requested == "graph" and device.type != "cuda":
        raise UserError(f"--execution graph replays CUDA graphs, and the device is {device.type}; leave the option out")
    if requested != "auto":
        return requested, "as requested"
    if device.type == "cuda" and measured:
        times = sorted(measured.items(), key=lambda item: item[1])
        return times[0][0], f"the gate measured {', '.join(f'{name} {ms:.2f} ms' for name, ms in times)}"
    if device.type == "cuda":
        plain = [name for name in fusable_options() if getattr(impl, name) == "reference"]
        if plain:  # a graph of d12's unfused operations took 2.2 times as long as the compiled model
            return "compile", f"these run as their reference: {', '.join(plain)}"
        return "graph", "faster than torch.compile wherever it was measured; nanochat kernels gate measures it here"
    return "eager", f"the device is {device.type}"


def step_on_meta(
    config: GPTConfig, dtype: torch.dtype, rows: int, length: int, weighted: bool = False
) -> None:  # fmt: skip
    """Do a training step with a micro-batch (rows, length) on the meta device, for nanochat_kernels.ahead."""
    model = GPT(config, dtype).to("meta")
    optimizer = MuonAdamW(model, graphs=False, alone=True)
    optimizer.keep_gradients(model)
    tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    weight = torch.ones(tokens.shape if weighted else (), device="meta")
    model(tokens, tokens, loss_weight=weight).backward()
    optimizer.begin_step(1.0, 0.95)
    optimizer.update_weights()


def compile_ahead(model: GPT, rows: int, length: int, weighted: bool) -> None:
    """Compile the kernels of a step side by side, which its launches would compile one after the other."""
    if model.device.type == "cuda":
        config = replace(model.config, depth=min(model.config.depth, 2))  # more blocks need no other code
        step = partial(step_on_meta, config, model.compute_dtype, rows, length, weighted)
        try:
            ahead.compile_launches_of(step, model.device, processes_here())
        except (kernels.KernelRequestError, RuntimeError) as error:  # such as torch's attention, which needs a GPU
            say(f"kernels are compiled one after the other, because a step without data failed: {error}")


class MicroStep:
    """Runs forward and backward of a micro-batch, which counts with a weight in its step.

    A call adds the weighted gradients to those that the optimizer collects, and the weighted loss to `loss`, a float32 scalar on
    the device. one_length: the rows of all batches have the same length. exchanges: the last call of a step also exchanges the
    gradients with the other processes, while backward computes them; see EXCHANGES_EARLY. Raises UserError for a compiled model
    that is to compute parts again.
    """

    def __init__(self, model: GPT, optimizer: MuonAdamW, execution: str, one_length: bool):
        self.model, self.device, self.optimizer = model, model.device, optimizer
        self.can_exchange = execution == "graph" and optimizer.world_size > 1
        self.exchanges = self.can_exchange and EXCHANGES_EARLY[architecture.architecture(self.device.index)]
        self.loss = torch.zeros((), device=self.device)
        if execution == "graph":
            optimizer.keep_gradients(model)
            self.weight = torch.ones((), device=self.device)
            self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
            # by rows, length, whether it exchanges the gradients, and whether tokens have weights
            self.graphs: dict[tuple[int, int, bool, bool], tuple[Batch, Replayed]] = {}
            self._run: Callable[[Batch, float, bool], None] = self._replay
        else:
            compiled = execution == "compile"
            if compiled and model.config.recompute:
                raise UserError(
                    "--recompute is for micro-steps from a graph or in eager mode: torch.compile itself decides what to compute again, "
                    "and here it compiles the model; leave --recompute out, or give --execution graph"
                )
            # dynamic=None: torch compiles for one length first, and for any length when a second one comes
            self.forward = torch.compile(model, dynamic=False if one_length else None) if compiled else model
            self._run = self._plain

    @ranges.named("micro-step")
    def __call__(self, batch: Batch, weight: float, last: bool = False) -> None:
        """Compute a micro-batch. last: it is the last one of its step, on every process."""
        exchange = last and self.exchanges
        self._run(batch, weight, exchange)
        self.optimizer.exchanged = exchange

    def _plain(self, batch: Batch, weight: float, exchange: bool) -> None:
        batch = batch.to(self.device)
        weights = {} if batch.loss_weight is None else {"loss_weight": batch.loss_weight}
        loss = self.forward(batch.inputs, batch.targets, **weights) * weight
        loss.backward()
        self.loss += loss.detach()

    def _replay(self, batch: Batch, weight: float, exchange: bool) -> None:
        rows, length = batch.inputs.shape
        padded = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        longest = max(length, min(padded, self.model.config.context_length))
        shape = (rows, longest, exchange, batch.loss_weight is not None)
        if not self.graphs:
            compile_ahead(self.model, rows, longest, shape[3])
        if shape not in self.graphs:
            self.graphs[shape] = self._make_graph(*shape)
        static, forward_and_backward = self.graphs[shape]
        # padding: any token, without a target; causal attention hides it from the tokens before it
        for old, new, padding in (
            (static.inputs, batch.inputs, 0),
            (static.targets, batch.targets, -1),
            (static.loss_weight, batch.loss_weight, 0),
        ):
            if new is not None:
                old[:, length:].fill_(padding)
                old[:, :length].copy_(new.pin_memory() if new.device != self.device else new, non_blocking=True)
        self.weight.fill_(weight)
        forward_and_backward()

    def _make_graph(self, rows: int, length: int, exchange: bool, weighted: bool) -> tuple[Batch, Replayed]:
        """A batch (rows, length) at fixed addresses, and the forward and backward pass on it."""
        inputs, targets = (torch.zeros(rows, length, dtype=torch.int64, device=self.device) for _ in range(2))
        batch = Batch(inputs, targets, (), 0.0, torch.zeros(rows, length, device=self.device) if weighted else None)

        def forward_and_backward() -> None:
            weight = self.weight * batch.loss_weight if weighted else self.weight
            with self.optimizer.exchanging(self.model) if exchange else nullcontext():
                loss = self.model(inputs, targets, loss_weight=weight)
                loss.backward()
            self.loss += loss.detach()

        return batch, Replayed(forward_and_backward, self.pool, warm_up=1)
