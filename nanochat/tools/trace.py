"""`nanochat trace`: the tensors of a forward pass, operation by operation, for people who study the architecture."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

import nanochat_kernels as kernels
from nanochat.checkpoint import load_model
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.options.tools import TraceOptions
from nanochat.options.train import SAMPLE_PROMPTS
from nanochat.platform.console import console, say, show_table
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths

TABLE_WIDTH = 170  # columns that the table with all of its texts takes

# the references are plain PyTorch, whose every step can be observed; a fused kernel keeps its intermediate results on the chip
REFERENCES = Implementations(**{field.name: "reference" for field in fields(Implementations)})


@dataclass(frozen=True)
class Row:
    """A row of the table: a tensor's shape, dtype and statistics, and what it means."""

    operation: str
    shape: str
    dtype: str
    mean: float
    std: float
    low: float
    high: float
    meaning: str

    @classmethod
    def of(cls, operation: str, tensor: Tensor, meaning: str) -> "Row":
        x = tensor.detach().float()
        shape = "×".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        std = x.std(correction=0).item()
        return cls(operation, shape, dtype, x.mean().item(), std, x.min().item(), x.max().item(), meaning)


@dataclass(frozen=True)
class Observation:
    """A tensor to show: what the torch function `function` returns when the forward method of `module` calls it."""

    module: str  # its name in the model; empty: the model itself
    function: str
    operation: str
    meaning: str
    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor  # for the table


def observations_of(config: GPTConfig, rows: int) -> list[Observation]:
    """The tensors to show of a forward pass with targets, in the order in which they are computed; rows: of the batch."""
    observations = [
        Observation("embedding", "embedding", "embedding", "each id becomes a vector of width C"),
        Observation("", "rms_norm", "rms_norm", "every vector scaled to root mean square 1; there is no weight"),
    ]
    for i in range(config.depth):
        observations += _observations_of_block(i)
    softcap, guessing = kernels.SOFTCAP, torch.tensor(config.vocab_size).log()
    by_row = lambda logits: logits.unflatten(0, (rows, -1))  # noqa: E731
    return [
        *observations,
        Observation("", "rms_norm", "final rms_norm", "what the head reads"),
        Observation(
            "", "linear", "head", "a score for each token of the vocabulary; zero before the first step", by_row
        ),
        Observation(
            "", "mul", "softcap", f"{softcap:g}·tanh(z/{softcap:g}) keeps every score within ±{softcap:g}", by_row
        ),
        Observation("", "div", "cross entropy", f"mean nats per token; guessing costs ln V = {guessing:.3f}"),
    ]


def _observations_of_block(i: int) -> list[Observation]:
    name, attention, mlp = f"block {i}", f"blocks.{i}.attention", f"blocks.{i}.mlp"
    rotated = "rotated by an angle that grows with the position, then normalised over the head"
    squared = "4·C hidden units, negative ones set to zero, the others squared; about half are zero"
    attended = "softmax(q·kᵀ/√D)·v over this position and those before it"
    by_token = lambda heads: heads.transpose(1, 2)  # noqa: E731
    return [
        Observation(attention, "rms_norm", f"{name} rms_norm", "the residual stream, normalised for attention"),
        Observation(attention, "unflatten", f"{name} query", "what each position looks for, cut into heads of width D"),
        Observation(attention, "unflatten", f"{name} key", "what each position offers"),
        Observation(attention, "unflatten", f"{name} value", "what each position passes on"),
        Observation(attention, "rms_norm", f"{name} rotation and norm of q", rotated),
        Observation(
            attention, "rms_norm", f"{name} rotation and norm of k", "the same, so that |q·k|/√D never passes √D"
        ),
        Observation(attention, "scaled_dot_product_attention", f"{name} attention", attended, by_token),
        Observation(attention, "linear", f"{name} projection", "heads mixed; the matrix is zero before the first step"),
        Observation(attention, "add", f"{name} residual", "added to the residual stream"),
        Observation(mlp, "rms_norm", f"{name} rms_norm 2", "the residual stream, normalised for the MLP"),
        Observation(mlp, "square", f"{name} relu²", squared),
        Observation(mlp, "linear", f"{name} MLP output", "back to width C"),
        Observation(mlp, "add", f"{name} residual 2", "added to the residual stream"),
    ]


class Observer(TorchFunctionMode):
    """While it is active, collects a row for each observation of a model's own forward pass.

    It sees every torch function that is called, and nothing of the model is changed for it. `running`: the names of the
    modules whose forward method is running, the innermost last.
    """

    def __init__(self, observations: list[Observation], running: list[str]):
        super().__init__()
        self.rows: list[Row] = []
        self._observations, self._running = observations, running

    @property
    def missing(self) -> list[Observation]:
        """The observations that were not made."""
        return self._observations[len(self.rows) :]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        wanted = self.missing[0] if self.missing else None
        if wanted and self._running and (self._running[-1], function.__name__) == (wanted.module, wanted.function):
            self.rows.append(Row.of(wanted.operation, wanted.layout(result), wanted.meaning))
        return result


@contextmanager
def _running_modules(model: GPT) -> Iterator[list[str]]:
    """The names of the modules whose forward method is running, the innermost last; kept up to date inside of the block."""
    running: list[str] = []

    def leave(module, inputs, output) -> None:
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, inputs, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def observed_forward(model: GPT, tokens: Tensor, targets: Tensor) -> list[Row]:
    """The rows of one forward pass of a model whose operations run as their references."""
    with (
        _running_modules(model) as running,
        Observer(observations_of(model.config, tokens.size(0)), running) as observer,
    ):
        model(tokens, targets)
    if observer.missing:
        raise RuntimeError(f"the forward pass has no {observer.missing[0]}")
    return [Row.of("tokens", tokens, "ids of the text, B rows of T"), *observer.rows]


def trace(options: TraceOptions, paths: Paths) -> list[Row]:
    """Show the tensors of one forward pass: of a small model after a few training steps, or of the newest model of a stage that
    reads the prompt. Returns the rows of the table. Raises UserError for a prompt without a stage.
    """
    if options.prompt and options.stage == "none":
        raise UserError("--prompt needs --stage base, mid or sft: the model that reads it")
    rows = _of_small_model(options) if options.stage == "none" else _of_checkpoint(options, paths)
    if console.is_terminal and console.width < TABLE_WIDTH:
        for line in narrow(rows, console.width):
            console.print(line, highlight=False)
    else:
        show_table(_table(rows))
    if options.markdown:
        options.markdown.write_text(markdown(rows), "utf-8")
        say(f"written to {options.markdown}")
    return rows


def _of_small_model(options: TraceOptions) -> list[Row]:
    shape = GPTConfig.from_depth(options.depth, options.vocab_size, options.tokens, impl=REFERENCES)
    model = GPT.create(shape)
    optimizer = MuonAdamW(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocab_size, (options.rows, options.tokens + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    for step in range(options.steps):
        loss = model(inputs, targets)
        loss.backward()
        norm = optimizer.synchronize()
        optimizer.update(1.0, 0.85)
        say(f"step {step}: loss {loss.item():.4f}, gradient norm {norm.item():.4f}")
    return observed_forward(model, inputs, targets)


def _of_checkpoint(options: TraceOptions, paths: Paths) -> list[Row]:
    with start_runtime("cpu") as runtime:
        model, tokenizer, meta = load_model(paths, options.stage, runtime, REFERENCES)
    tokens = [tokenizer.bos, *tokenizer.encode(options.prompt or SAMPLE_PROMPTS[0])]
    if len(tokens) < 2:
        raise UserError("the prompt has no tokens; give some text")
    say(
        f"{options.stage}, step {meta['step']}, reads {' '.join(repr(tokenizer.decode([token])) for token in tokens[1:])}"
    )
    ids = torch.tensor([tokens])
    rows = observed_forward(model, ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        likely = model(ids)[0, -1].softmax(0).topk(3)
    guesses = (f"{tokenizer.decode([int(i)])!r} {p:.0%}" for p, i in zip(*likely, strict=True))
    say(f"most likely after it: {', '.join(guesses)}")
    return rows


def _table(rows: list[Row]) -> Table:
    table = Table(title="Forward pass")
    for column, style in (("operation", "bold cyan"), ("shape", "green"), ("dtype", "yellow")):
        table.add_column(column, style=style, overflow="fold")
    for column in ("mean", "std", "min", "max"):
        table.add_column(column, justify="right", style="magenta", overflow="fold")
    table.add_column("what happens")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def narrow(rows: list[Row], width: int) -> Iterator[str]:
    """The rows for a narrow terminal: name, shape and numbers on a line, and below it what happens; with rich's marks for colours."""
    name = max(len(row.operation) for row in rows)
    shape = max(len(row.shape) for row in rows)
    yield f"[bold]{'operation':{name}} {'shape':{shape}} {'mean':>8} {'std':>8} {'min':>8} {'max':>8}[/bold]"
    for row in rows:
        numbers = " ".join(f"{value:8.2g}" for value in (row.mean, row.std, row.low, row.high))
        yield f"[bold cyan]{row.operation:{name}}[/] [green]{row.shape:{shape}}[/] [magenta]{numbers}[/]"
        for line in textwrap.wrap(f"{row.dtype}: {row.meaning}", width - 4):
            yield f"    [dim]{escape(line)}[/dim]"


def _cells(row: Row) -> list[str]:
    numbers = [f"{value:.4g}" for value in (row.mean, row.std, row.low, row.high)]
    return [row.operation, row.shape, row.dtype, *numbers, row.meaning]


def markdown(rows: list[Row]) -> str:
    header = (
        "| operation | shape | dtype | mean | std | min | max | what happens |\n|---|---|---|---:|---:|---:|---:|---|\n"
    )
    return header + "".join(f"| {' | '.join(cell.replace('|', '∣') for cell in _cells(row))} |\n" for row in rows)
