"""`nanochat trace`: what flows through the model, operation by operation, for people who study the architecture."""

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPT, SOFTCAP, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.tools import TraceOptions
from nanochat.platform.console import console, say


@dataclass(frozen=True)
class Row:
    operation: str
    shape: str
    dtype: str
    mean: float
    std: float
    low: float
    high: float
    meaning: str


class Tracer:
    """Collects one row an operation."""

    def __init__(self):
        self.rows: list[Row] = []

    def __call__(self, operation: str, tensor: Tensor, meaning: str) -> Tensor:
        x = tensor.detach().float()
        std = x.std(correction=0).item()
        shape = "×".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.rows.append(Row(operation, shape, dtype, x.mean().item(), std, x.min().item(), x.max().item(), meaning))
        return tensor


def traced_forward(model: GPT, tokens: Tensor, targets: Tensor, note: Tracer) -> Tensor:
    """The forward pass of `GPT`, written out; returns the loss. A test keeps it equal to the model's own."""
    note("tokens", tokens, "ids of the text, B rows of T")
    x = model.embedding.weight[tokens].to(model.compute_dtype)
    note("embedding", x, "each id becomes a vector of width C")
    x = note("rms_norm", kernels.rms_norm(x), "every vector scaled to root mean square 1; there is no weight")
    for i, block in enumerate(model.blocks):
        x = _traced_block(model, block, i, x, note)
    x = note("final rms_norm", kernels.rms_norm(x), "what the head reads")
    logits = model.head(x).float()
    note("head", logits, "a score for each token of the vocabulary; zero before the first step")
    logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
    note("softcap", logits, f"{SOFTCAP:g}·tanh(z/{SOFTCAP:g}) keeps every score within ±{SOFTCAP:g}")
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    return note(
        "cross entropy", loss, f"mean nats a token; guessing costs ln V = {torch.tensor(logits.size(-1)).log():.3f}"
    )


def _traced_block(model: GPT, block, i: int, x: Tensor, note: Tracer) -> Tensor:
    name, attention, mlp = f"block {i}", block.attention, block.mlp
    batch, count, _ = x.shape
    h = note(f"{name} rms_norm", kernels.rms_norm(x), "the residual stream, normalised for attention")
    q, k, v = (
        note(
            f"{name} {part}",
            getattr(attention, part)(h).view(batch, count, -1, attention.config.head_width),
            meaning,
        )
        for part, meaning in (
            ("query", "what each position looks for, cut into heads of width D"),
            ("key", "what each position offers"),
            ("value", "what each position hands over"),
        )
    )
    q, k = kernels.qk_norm_rope(q, k, model.cos, model.sin)
    note(f"{name} qk_norm_rope q", q, "rotated by an angle that grows with the position, then normalised over the head")
    note(f"{name} qk_norm_rope k", k, "the same, so that |q·k|/√D never passes √D")
    y = kernels.attention(q, k, v)
    note(f"{name} attention", y, "softmax(q·kᵀ/√D)·v over this position and those before it")
    y = attention.project(y.reshape(batch, count, -1))
    note(f"{name} projection", y, "heads mixed; the matrix is zero before the first step")
    x = note(f"{name} residual", x + y, "added to the residual stream")
    h = note(f"{name} rms_norm 2", kernels.rms_norm(x), "the residual stream, normalised for the MLP")
    hidden = mlp.expand(h).relu().square()
    note(f"{name} relu²", hidden, "4·C hidden units, negative ones cut, the rest squared; about half are zero")
    y = note(f"{name} MLP output", mlp.project(hidden), "back to width C")
    return note(f"{name} residual 2", x + y, "added to the residual stream")


def trace(options: TraceOptions) -> list[Row]:
    """Train the small model for a few steps, then show one traced pass."""
    shape = GPTConfig.from_depth(options.depth, options.vocab_size, options.tokens)
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
    note = Tracer()
    with torch.no_grad():
        traced_forward(model, inputs, targets, note)
    console.print(_table(note.rows))
    if options.markdown:
        options.markdown.write_text(markdown(note.rows), "utf-8")
        say(f"written to {options.markdown}")
    return note.rows


def _table(rows: list[Row]) -> Table:
    table = Table(title="Forward pass")
    for column, style in (("operation", "bold cyan"), ("shape", "green"), ("dtype", "yellow")):
        table.add_column(column, style=style, no_wrap=True)
    for column in ("mean", "std", "min", "max"):
        table.add_column(column, justify="right", style="magenta", no_wrap=True)
    table.add_column("what happens")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    numbers = [f"{value:.4g}" for value in (row.mean, row.std, row.low, row.high)]
    return [row.operation, row.shape, row.dtype, *numbers, row.meaning]


def markdown(rows: list[Row]) -> str:
    header = (
        "| operation | shape | dtype | mean | std | min | max | what happens |\n|---|---|---|---:|---:|---:|---:|---|\n"
    )
    return header + "".join(f"| {' | '.join(cell.replace('|', '∣') for cell in _cells(row))} |\n" for row in rows)
