"""The training loop of every stage: accumulate, synchronise, clip, update; log, evaluate, save, resume, stop.

Between two steps, at boundary s (s updates done), the loop saves when due, evaluates when due, and ends when asked to.
A run resumed from the checkpoint of boundary s does from there what the uninterrupted run did.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from nanochat.checkpoint import CheckpointStore
from nanochat.console import progress_bar, say
from nanochat.data.loader import Batch, prefetched
from nanochat.errors import TrainingStopped, UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, muon_momentum
from nanochat.paths import Paths
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.diagnose import offending_tensor
from nanochat.train.metrics import MetricsLog, WandbLog
from nanochat.train.micro_step import Execution, MicroStep, choose_execution

SMOOTHING = 0.95
WARM_UP_STEPS = (
    3  # of a process: kernels are compiled and graphs captured in them, so they say nothing of the time left
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class RunOptions:
    """How a training stage runs; none of it changes what is learned."""

    device: str = "auto"
    """auto (cuda when there, else cpu), cuda, cpu or mps"""
    execution: Execution = "auto"
    """how a micro-step runs: graph (replayed from a CUDA graph), compile (torch.compile) or eager; auto takes graph on CUDA"""
    save_every: int = 1000
    """steps between checkpoints; 0 saves only at the end and on a signal"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay"""
    deterministic: bool = False
    """on CUDA, use only operations that repeat bit for bit, at some cost in speed; a CPU repeats anyway"""
    loader_threads: int = 4
    """threads that tokenise"""
    wandb_run: str = ""
    """name of a wandb run; empty: none"""
    wandb_mode: str = "offline"
    """offline or online"""


@dataclass(frozen=True)
class Evaluation:
    """Something measured at every `every`-th boundary and at the last one; 0: at the last one only, negative: never."""

    every: int
    measure: Callable[[], dict]
    first: bool = False  # also before the first step

    def due(self, step: int, last: bool) -> bool:
        if self.every < 0:
            return False
        return last or (self.first if step == 0 else self.every > 0 and step % self.every == 0)


@dataclass
class Stage:
    """What distinguishes one training stage from another."""

    name: str
    batches: Callable[[list | None], Iterator[Batch]]  # from the saved positions of all ranks; None: the beginning
    accumulation: int  # micro-batches a step on each rank
    lr_multiplier: Callable[[float], float]  # of the progress, 0 to 1
    steps: int | None  # None: until the data ends
    one_length: bool = True  # all batches have rows of one length
    evaluations: list[Evaluation] = field(default_factory=list)


def accumulation_steps(total_batch: int, rows: int, row_size: int, world_size: int, unit: str) -> int:
    """Micro-batches a step. Raises UserError naming the nearest valid totals when it is no whole number."""
    micro = rows * row_size * world_size
    if total_batch % micro:
        below, above = total_batch // micro * micro, -(-total_batch // micro) * micro
        nearest = " or ".join(str(n) for n in (below, above) if n > 0)
        raise UserError(
            f"a step of {total_batch} {unit} is no multiple of the {micro} {unit} that {world_size} process(es) take at "
            f"once ({rows} rows of {row_size} each); the nearest valid totals are {nearest}"
        )
    return total_batch // micro


class Interrupt:
    """Remembers a signal until the loop looks; a second one acts at once."""

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self) -> "Interrupt":
        try:
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        except ValueError:  # not the main thread: the caller handles signals
            self._previous = {}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        say(f"{signal.Signals(number).name} received: finishing this step, then saving (again: stop at once)")


class Trainer:
    """Runs a stage on a model, from its newest checkpoint if there is one."""

    def __init__(
        self,
        stage: Stage,
        model: GPT,
        optimizer: MuonAdamW,
        tokenizer: Tokenizer,
        paths: Paths,
        runtime: Runtime,
        options: RunOptions,
        settings: dict,
    ):
        self.stage, self.model, self.optimizer, self.tokenizer = stage, model, optimizer, tokenizer
        self.paths, self.runtime, self.options, self.settings = paths, runtime, options, settings
        self.store = CheckpointStore(paths.checkpoints(stage.name), runtime, options.keep_checkpoints)
        execution, why = choose_execution(options.execution, runtime.device)
        if runtime.primary:
            say(f"micro-steps: {execution} ({why})")
        self.micro_step = MicroStep(model, optimizer, execution, one_length=stage.one_length)
        self.smoothed = self.elapsed = 0.0
        self.steps_here = 0  # of this process
        self.pace_seconds = self.pace_start = 0.0  # of its steps after the first ones, and the progress before those
        self.tokens = 0
        self.saved_step = -1
        self.results: dict = {}

    def run(self) -> dict:
        """Train to the end; returns the last evaluation's results, loss, steps, tokens and time."""
        torch.use_deterministic_algorithms(self.options.deterministic, warn_only=True)
        start, position = self._resume()
        with Interrupt() as self.interrupt:
            self.log = MetricsLog(self.paths.metrics(self.stage.name), start) if self.runtime.primary else None
            wandb_run = self.options.wandb_run if self.runtime.primary else ""
            self.wandb = WandbLog(wandb_run, self.options.wandb_mode, self.stage.name, self.settings)
            bar = progress_bar(f"train {self.stage.name}", self.stage.steps, quiet=not self.runtime.primary)
            try:
                with prefetched(self.stage.batches(position)) as batches, bar as advance:
                    return self._loop(start, batches, advance)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of memory on {self.runtime.device_name} ({str(error).splitlines()[0]}); lower "
                    "--device-batch-size: the step stays the same, more of it is accumulated"
                ) from error
            finally:
                self.wandb.close()
                if self.log:
                    self.log.close()

    def _resume(self) -> tuple[int, list | None]:
        steps = self.store.steps()
        self.position: tuple[int, ...] = ()  # of the loader, behind the last step
        if not steps:
            return 0, None
        self.saved_step = steps[-1]
        meta = self.store.load(self.saved_step, self.model, self.optimizer, self.tokenizer)
        self.smoothed, self.elapsed, self.tokens = meta["smoothed_loss"], meta["elapsed"], meta["tokens"]
        changed = [k for k in self.settings if self.settings[k] != meta["settings"].get(k)]
        if changed:
            raise UserError(
                f"{self.store.path(self.saved_step)} was trained with other settings ({', '.join(changed)}); give the same "
                f"ones to resume, or move {self.store.directory} away to start anew"
            )
        if self.runtime.primary:
            say(f"resuming {self.stage.name} at step {self.saved_step}")
        return self.saved_step, meta["positions"] if self.saved_step else None

    def _loop(self, step: int, batches: Iterator[Batch], advance: Callable) -> dict:
        while True:
            micro = self._take(batches) if step != self.stage.steps else []
            interrupted, ended = self._agree(micro)
            last = ended or step == self.stage.steps
            if interrupted:
                self._save(step)
                number = self.interrupt.received or signal.SIGUSR1
                by = signal.Signals(number).name if self.interrupt.received else f"the file {self.paths.stop}"
                raise TrainingStopped(
                    f"training {self.stage.name} stopped at step {step} by {by}; all is saved in "
                    f"{self.store.path(step)}; the same command goes on from there",
                    128 + number,
                )
            self._boundary(step, last)
            if last:
                return self.results | {
                    "steps": step,
                    "tokens": self.tokens,
                    "loss": self.smoothed / (1 - SMOOTHING**step) if step else 0.0,
                    "train_seconds": self.elapsed,
                    "tokens_per_second": self.tokens / self.elapsed if self.elapsed else 0.0,
                }
            self._step(step, micro, advance)
            step += 1

    def _take(self, batches: Iterator[Batch]) -> list[Batch]:
        micro = []
        while len(micro) < self.stage.accumulation and (batch := next(batches, None)) is not None:
            micro.append(batch)
        return micro

    def _agree(self, micro: list[Batch]) -> tuple[bool, bool]:
        """One exchange between ranks: was one interrupted, has one no more data; and the step's valid targets, progress."""
        valid = sum(int((batch.targets != -1).sum()) for batch in micro)
        short = float(len(micro) < self.stage.accumulation)
        progress = micro[-1].progress if micro else 1.0
        asked = self.runtime.primary and self.paths.stop.exists()
        stop = float(self.interrupt.received is not None or asked)
        self.valid, short, progress, stop = self.runtime.sum([float(valid), short, progress, stop])
        self.data_progress = progress / self.runtime.world_size
        return stop > 0, short > 0

    def _boundary(self, step: int, last: bool) -> None:
        due = [e for e in self.stage.evaluations if e.due(step, last)]
        every = self.options.save_every
        if last or (step > 0 and ((every > 0 and step % every == 0) or due)):
            self._save(step)
        if not due:
            return
        results = {}
        for evaluation in due:
            results |= evaluation.measure()
        self.results |= results
        self._write({"step": step, **results})
        if self.runtime.primary:
            shown = [f"{name} {value:.4f}" for name, value in results.items() if isinstance(value, float)]
            say(f"step {step:05d} | {' | '.join(shown)}") if shown else None

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        meta = {
            "stage": self.stage.name,
            "tokenizer": self.tokenizer.hash,
            "settings": self.settings,
            "positions": self.runtime.gather(self.position),
            "smoothed_loss": self.smoothed,
            "elapsed": self.elapsed,
            "tokens": self.tokens,
        }
        self.store.save(step, self.model, self.optimizer, meta)
        self.saved_step = step

    def _step(self, step: int, micro: list[Batch], advance: Callable) -> None:
        started = time.perf_counter()
        progress = step / self.stage.steps if self.stage.steps else self.data_progress
        self.micro_step.loss.zero_()
        for batch in micro:
            # a micro-batch counts by its targets; ranks are averaged when gradients are synchronised
            self.micro_step(batch, int((batch.targets != -1).sum()) * self.runtime.world_size / max(self.valid, 1.0))
        norm = self.optimizer.synchronize()
        loss_value, norm_value = self.runtime.read(torch.stack([self.micro_step.loss, norm]))
        [total] = self.runtime.sum([loss_value])
        loss_value = total / self.runtime.world_size
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._stop_not_finite(step, loss_value, norm_value, micro)
        multiplier = self.stage.lr_multiplier(progress)
        self.optimizer.update(multiplier, muon_momentum(step))
        self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss_value
        self.position = micro[-1].position
        self._report(step, started, progress, multiplier, loss_value, norm_value, micro, advance)

    def _report(self, step, started, progress, multiplier, loss, norm, micro, advance) -> None:
        seconds = time.perf_counter() - started
        tokens = sum(batch.inputs.numel() for batch in micro) * self.runtime.world_size
        self.elapsed += seconds
        self.tokens += tokens
        advance(completed=step + 1)
        if not self.runtime.primary:
            return
        debiased = self.smoothed / (1 - SMOOTHING ** (step + 1))
        rate, peak = tokens / seconds, self.runtime.peak_flops
        mfu = self.model.config.flops_per_token * rate / (peak * self.runtime.world_size) if peak else None
        done = (step + 1) / self.stage.steps if self.stage.steps else self.data_progress
        remaining = self._remaining(seconds, done)
        total = f"/{self.stage.steps:05d}" if self.stage.steps else ""
        say(
            f"step {step:05d}{total} ({100 * done:.1f}%) | loss {debiased:.4f} | lr {multiplier:.2f} | "
            f"dt {seconds * 1e3:.0f} ms | {rate:,.0f} tok/s | mfu {f'{100 * mfu:.1f}%' if mfu else '–'} | "
            f"{_clock(self.elapsed)} elapsed, {'–' if remaining is None else _clock(remaining)} left"
        )
        record = {"step": step, "loss": loss, "smoothed_loss": debiased, "grad_norm": norm, "lr_multiplier": multiplier}
        timing = {"dt": seconds, "tokens_per_second": rate, "mfu": mfu, "tokens": self.tokens, "elapsed": self.elapsed}
        timing |= {"progress": done, "remaining": remaining}
        self._write(record | timing)

    def _remaining(self, seconds: float, done: float) -> float | None:
        """Seconds left at the pace of this process's steps, without its first ones, which compile and capture kernels."""
        self.steps_here += 1
        if self.steps_here <= WARM_UP_STEPS:
            self.pace_start = done
            return None
        self.pace_seconds += seconds
        progress = done - self.pace_start
        return self.pace_seconds * (1 - done) / progress if progress > 0 else None

    def _write(self, record: dict) -> None:
        if self.log:
            self.log.write(record)
            self.wandb.write(record)

    def _stop_not_finite(self, step: int, loss: float, norm: float, micro: list[Batch]) -> None:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        last = self.store.path(self.saved_step) if self.saved_step >= 0 else "none"
        raise UserError(
            f"step {step} of {self.stage.name}: {what}; offending tensor: "
            f"{offending_tensor(self.model, micro, self.runtime.device)}; last good checkpoint: {last}; "
            "lower the learning rates or look at the data, then run the same command again"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
