"""Forward and backward of one micro-batch, in the way that costs the host and the GPU least.

graph: the operations as they are, captured in a CUDA graph once for each shape and replayed. Gradients of matrices are added
to the optimizer's buffers in float32 by the products that make them. compile: torch.compile, gradients by autograd.
eager: neither. By default CUDA takes the graph, everything else eager.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nanochat.data.batches import Batch
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.options.train import Execution
from nanochat.platform.cuda_graphs import Replayed
from nanochat.platform.errors import UserError

FUSED = (
    "rms_norm",
    "qk_norm_rope",
    "relu2_mlp",
    "linear_cross_entropy",
)  # have kernels of ours; attention has none yet
LENGTH_CLASS = 128  # tokens: shorter rows are padded to a multiple of it, so that few graphs serve all of fine-tuning


def choose_execution(
    asked: Execution, device: torch.device, impl: Implementations, measured: Mapping[str, float] | None = None
) -> tuple[str, str]:
    """What `asked` means on the device for a model with these implementations, and why.

    measured: milliseconds of a micro-step by execution, where the gate has measured them. Raises UserError for a graph without CUDA.
    """
    if asked == "graph" and device.type != "cuda":
        raise UserError(f"--execution graph replays CUDA graphs, and the device is {device.type}; leave the option out")
    if asked != "auto":
        return asked, "as asked"
    if device.type == "cuda" and measured:
        times = sorted(measured.items(), key=lambda item: item[1])
        return times[0][0], f"the gate measured {', '.join(f'{name} {ms:.2f} ms' for name, ms in times)}"
    if device.type == "cuda":
        plain = [name for name in FUSED if getattr(impl, name) == "reference"]
        if plain:  # launched one by one in a graph, d12's plain operations took 2.2 times as long as compiled ones
            return "compile", f"these run as their reference: {', '.join(plain)}"
        return "graph", "faster than torch.compile wherever it was measured; nanochat kernels gate measures it here"
    return "eager", f"the device is {device.type}"


class MicroStep:
    """Called with a micro-batch and its weight in the step: adds the weighted gradients where the optimizer collects them, and
    the weighted loss to `loss`, a scalar on the device. `one_length`: all batches have rows of the same length."""

    def __init__(self, model: GPT, optimizer: MuonAdamW, execution: str, one_length: bool):
        self.model, self.device = model, model.device
        self.loss = torch.zeros((), device=self.device)
        if execution == "graph":
            optimizer.keep_gradients(model)
            self.weight = torch.ones((), device=self.device)
            self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
            self.prepared: dict[tuple[int, int], tuple[Tensor, Tensor, Replayed]] = {}
            self._run: Callable[[Batch, float], None] = self._replay
        else:
            compiled = execution == "compile"
            self.forward = torch.compile(model, dynamic=False if one_length else None) if compiled else model
            self._run = self._plain

    def __call__(self, batch: Batch, weight: float) -> None:
        self._run(batch, weight)

    def _plain(self, batch: Batch, weight: float) -> None:
        batch = batch.to(self.device)
        loss = self.forward(batch.inputs, batch.targets) * weight
        loss.backward()
        self.loss += loss.detach()

    def _replay(self, batch: Batch, weight: float) -> None:
        rows, length = batch.inputs.shape
        shape = (rows, max(length, min(-(-length // LENGTH_CLASS) * LENGTH_CLASS, self.model.config.context_length)))
        if shape not in self.prepared:
            self.prepared[shape] = self._prepare(*shape)
        inputs, targets, work = self.prepared[shape]
        if shape[1] > length:  # the rest: any token, with no target; what lies before does not see it
            inputs[:, length:].zero_(), targets[:, length:].fill_(-1)
        for still, new in ((inputs, batch.inputs), (targets, batch.targets)):
            still[:, :length].copy_(new.pin_memory() if new.device != self.device else new, non_blocking=True)
        self.weight.fill_(weight)
        work()

    def _prepare(self, rows: int, length: int) -> tuple[Tensor, Tensor, Replayed]:
        """(inputs, targets, the work on them)."""
        inputs, targets = (torch.zeros(rows, length, dtype=torch.int64, device=self.device) for _ in range(2))

        def work() -> None:
            loss = self.model(inputs, targets, loss_weight=self.weight)
            loss.backward()
            self.loss += loss.detach()

        return inputs, targets, Replayed(work, self.pool, warm_up=1)
