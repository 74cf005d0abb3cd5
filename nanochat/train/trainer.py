"""The training loop of every stage: accumulate, synchronize, clip, update; log, evaluate, save, resume, stop.

Between two steps the loop saves and evaluates if either is due, and ends if a signal or the stop file asks for it. A run that
is resumed from a checkpoint continues exactly as the uninterrupted run did.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import NamedTuple, NoReturn

import torch

from nanochat.checkpoint import CheckpointStore, damaged
from nanochat.data.batches import Batch, prefetched
from nanochat.evaluate.chat import shown_name
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.options.train import RunOptions
from nanochat.platform.console import console, format_duration, output, progress, say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import TrainingStopped, UserError
from nanochat.platform.paths import Paths
from nanochat.platform.shapes import check_shape
from nanochat.platform.signals import handled
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.train.diagnose import offending_tensor
from nanochat.train.memory import predict_run
from nanochat.train.metrics import Metrics
from nanochat.train.micro_step import MicroStep, choose_execution
from nanochat.train.plan import Plan, filled_in
from nanochat.train.state import SHAPE, Pace, TrainState
from nanochat_kernels import ranges

# seconds in which a second signal repeats the first: torchrun passes on what a terminal has sent to all of its processes
SAME_REQUEST = 1.0
INPUTS = {
    "data": "data of",
    "first_weights": "weights at the start of",
}  # settings that are hashes of what a stage is made from


class Interrupt:
    """Remembers a signal until the loop checks for it at the end of a step; a second signal ends the process at once.

    In an evaluation the first one ends it: everything was saved before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._stopped: Callable[[], Exception] | None = None

    def handling(self) -> AbstractContextManager:
        """Handle signals while the block runs."""
        return handled(self._receive)

    @contextmanager
    def ending_at_once(self, stopped: Callable[[], Exception]) -> Iterator[None]:
        """While the block runs, a signal raises the exception that `stopped` makes; so does one that came before."""
        self._stopped = stopped
        try:
            if self.received is not None:
                raise stopped()
            yield
        finally:
            self._stopped = None

    def _receive(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            if time.monotonic() - self._when > SAME_REQUEST:
                say(f"{name} received again: ending at once, without saving")
                console.show_cursor()  # which a progress display has hidden
                # not by an exception, which would wait for threads that may never end
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._when = number, time.monotonic()
        if self._stopped is not None:
            raise self._stopped()
        say(f"{name} received: finishing this step, then saving (again: ending at once)")


class Agreement(NamedTuple):
    """What the ranks agree on before a step, in one exchange, so that all of them stop or continue together."""

    stop: bool  # a rank received a signal, or the stop file exists
    ended: bool  # a rank has no more data
    targets: float  # tokens of the step that have a target, over all ranks
    data_progress: float  # share of the data that is consumed after the step, 0 to 1


class Trainer:
    """Trains a model by the plan of a stage, from the stage's newest checkpoint if there is one.

    settings: the options that a resumed run must share with the run that it resumes. micro_step_ms: the gate's times of a
    micro-step, in milliseconds by execution.
    """

    def __init__(
        self,
        plan: Plan,
        model: GPT,
        optimizer: MuonAdamW,
        tokenizer: Tokenizer,
        paths: Paths,
        runtime: Runtime,
        options: RunOptions,
        settings: dict,
        micro_step_ms: dict[str, float] | None = None,
    ):
        self.plan, self.model, self.optimizer, self.tokenizer = plan, model, optimizer, tokenizer
        self.paths, self.runtime, self.options, self.settings = paths, runtime, options, settings
        self.store = CheckpointStore(paths.checkpoints(plan.stage), runtime, options.keep_checkpoints)
        execution, reason = choose_execution(options.execution, runtime.device, model.config.impl, micro_step_ms)
        if runtime.primary:
            say(f"micro-steps: {execution} ({reason})")
            if runtime.memory:
                needed = predict_run(model.config, plan.rows, runtime, execution).total + plan.cache_bytes
                say(
                    f"memory: about {needed / 1e9:.1f} GB of {runtime.memory / 1e9:.1f} with {plan.rows} rows in a micro-batch"
                )
        self.micro_step = MicroStep(model, optimizer, execution, one_length=plan.one_length)
        self.state, self.pace = TrainState(), Pace()
        self.started_at = 0  # the step that this start begins with; each start trains a step, so that many of them end
        self.saved_step = -1  # of the newest checkpoint; −1: there is none
        self.taking = 0.0  # seconds until all ranks had the micro-batches of the next step
        self.logging = 0.0  # seconds of the newest step's record and line
        self.results: dict = {}  # the newest result of each evaluation
        self.interrupt = Interrupt()
        self.metrics = Metrics(paths.metrics(plan.stage))

    def run(self) -> dict:
        """Train to the end; returns the newest evaluations, steps, tokens, loss, seconds (also of the starts that this one resumes)
        and tokens per second.

        Raises TrainingStopped after a signal, and UserError when memory runs out, the loss is not finite or a step has no targets.
        """
        torch.use_deterministic_algorithms(self.options.deterministic, warn_only=True)
        positions = self._resume()
        self.started_at = self.state.step
        recording = ranges.recorded(self.model.blocks) if self.options.nvtx else nullcontext()
        with self.interrupt.handling(), recording, ranges.span(f"train {self.plan.stage}"):
            if self.runtime.primary:
                wandb = self.options.wandb_run, self.options.wandb_mode
                self.metrics.open(self.state.step, *wandb, self.plan.stage, self.settings)
            bar = progress(f"train {self.plan.stage}", total=1, quiet=not self.runtime.primary)
            try:
                made = self.plan.batches(positions)
                with prefetched(made) if self.plan.ahead else nullcontext(made) as batches, bar as advance:
                    return self._loop(batches, advance)
            except torch.OutOfMemoryError as error:
                rollouts = "" if self.plan.ahead else "--sample-rows, or "
                raise UserError(
                    f"out of memory on {self.runtime.device_name} ({str(error).splitlines()[0]}); lower {rollouts}"
                    f"--device-batch-size (now {self.plan.rows}): the step stays the same, and is accumulated from more micro-batches"
                ) from error
            finally:
                self.metrics.close()

    def _resume(self) -> list | None:
        """Load the newest checkpoint; returns the positions of all ranks, or None when training starts at the beginning."""
        if self.runtime.primary:
            self.store.sweep()
        steps = self.store.steps()
        if not steps:
            return None
        self.saved_step = steps[-1]
        path = self.store.path(self.saved_step)
        meta = self.store.load(self.saved_step, self.model, self.optimizer, self.tokenizer)
        meta = {"seconds": meta.get("elapsed")} | meta  # earlier versions did not save it
        try:
            check_shape(meta, SHAPE, str(path / "meta.json"))
        except UserError as error:
            raise damaged(path, str(error)) from error
        # earlier versions did not save what the data and the first weights were, nor the size of a step beside that of the option
        saved = {name: self.settings.get(name) for name in (*INPUTS, "step_size")}
        saved |= filled_in(meta["settings"], self.settings)
        changed = [name for name in self.settings if self.settings[name] != saved.get(name)]
        if len(changed) == 1 and changed[0] in INPUTS:
            raise UserError(
                f"the {INPUTS[changed[0]]} {self.plan.stage} are not those that {path} was made from; bring those back to resume, "
                f"or move {self.store.directory} away to start again"
            )
        if changed:
            raise UserError(
                f"{path} was trained with other settings ({', '.join(changed)}); use the same ones to resume, or move "
                f"{self.store.directory} away to start again"
            )
        self.state = TrainState.from_meta(meta)
        if self.runtime.primary:
            say(f"resuming {self.plan.stage} at step {self.saved_step}")
        return meta["positions"] if self.saved_step else None

    def _loop(self, batches: Iterator[Batch], advance: Callable) -> dict:
        while True:
            started = time.perf_counter()
            more = self.state.step != self.plan.steps
            micro_batches = list(islice(batches, self.plan.accumulation)) if more else []  # fewer when the data end
            agreement = self._agree(micro_batches)
            self.taking = time.perf_counter() - started
            if agreement.ended and self.state.step == 0:
                raise UserError(
                    f"the data of {self.plan.stage} do not fill one step of {self.plan.accumulation} micro-batches on each of "
                    f"{self.runtime.world_size} processes; add data, or take fewer rows or conversations per step"
                )
            last = agreement.ended or self.state.step == self.plan.steps
            if agreement.stop and (last or self.state.step > self.started_at):
                self._save()
                raise self._stopped()
            if not agreement.stop:  # if it is to stop already, it trains one step and measures nothing before
                self._boundary(last)
            if last:
                if self.runtime.primary:
                    trained = f"{self.state.step:,} steps, {self.state.tokens:,} tokens"
                    say(f"trained {self.plan.stage}: {trained} in {format_duration(self.state.elapsed)}")
                return self._summary()
            if not agreement.targets:
                raise UserError(
                    f"step {self.state.step} of {self.plan.stage} has nothing to learn: none of its tokens is one that the assistant "
                    "has to produce; check that the conversations have answers, and that these begin within the context length"
                )
            self._step(micro_batches, agreement, advance)

    def _agree(self, micro_batches: list[Batch]) -> Agreement:
        """Exchange what each rank knows about the next step."""
        targets = sum(int((batch.targets != -1).sum()) for batch in micro_batches)
        short = len(micro_batches) < self.plan.accumulation
        progress = micro_batches[-1].progress if micro_batches else 1.0
        stop = self.interrupt.received is not None or (
            self.runtime.primary and (self._unseen or self.paths.stop.exists())
        )
        stops, shorts, all_targets, all_progress = self.runtime.sum(
            [float(x) for x in (stop, short, targets, progress)]
        )
        return Agreement(stops > 0, shorts > 0, all_targets, all_progress / self.runtime.world_size)

    @property
    def _unseen(self) -> bool:
        """Whether nothing tells of the training any more: neither the output nor the file of metrics can be written."""
        return output.error is not None and self.metrics.error is not None

    def _stopped(self) -> TrainingStopped:
        """What says why training was stopped, and what is saved; its exit status is that of the signal, or 1."""
        number, status = self.interrupt.received, 128 + signal.SIGUSR1
        if number is not None:
            cause, status = signal.Signals(number).name, 128 + number
        elif self._unseen:
            cause, status = f"output that cannot be written ({output.error.strerror}), nor can {self.metrics.path}", 1
        else:
            cause = f"the file {self.paths.stop}" if self.runtime.primary else "another process"
        saved = "nothing had to be saved; the same command starts again"
        if self.saved_step == self.state.step:
            saved = f"everything is saved in {self.store.path(self.saved_step)}; the same command resumes from there"
        return TrainingStopped(
            f"training {self.plan.stage} stopped at step {self.state.step} by {cause}; {saved}", status
        )

    def _boundary(self, last: bool) -> None:
        """Save and evaluate if due. It saves first, so that a failing evaluation costs no training."""
        step, every = self.state.step, self.options.save_every
        due = [evaluation for evaluation in self.plan.evaluations if evaluation.due(step, last)]
        if last or (step > 0 and ((every > 0 and step % every == 0) or due)):
            self._save()
        if not due:
            return
        started, results = time.perf_counter(), {}
        with self.interrupt.ending_at_once(self._stopped), ranges.span("evaluate"):
            for evaluation in due:
                results |= evaluation.measure()
        self.results |= results
        self.metrics.write({"step": step, **results, "evaluate_s": time.perf_counter() - started})
        embedded = self.paths.reads_embedded
        shown = [
            f"{shown_name(name, embedded)} {value:.4f}" for name, value in results.items() if isinstance(value, float)
        ]
        if self.runtime.primary and shown:
            say(f"step {step} | {' | '.join(shown)}")

    @ranges.named("save")
    def _save(self) -> None:
        # the last update may have been too large, and no loss has shown it yet
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            self._stop_not_finite("a weight is not finite", [])
        if self.state.step == self.saved_step:
            return
        started = time.perf_counter()
        meta = {"stage": self.plan.stage, "tokenizer": self.tokenizer.hash, "settings": self.settings}
        meta |= {"rows": self.plan.rows} | self.state.to_meta(self.runtime.gather(self.state.position))
        self.store.save(self.state.step, self.model, self.optimizer, meta)
        self.saved_step = self.state.step
        self.metrics.write({"step": self.saved_step, "save_s": time.perf_counter() - started})

    @ranges.named("step")
    def _step(self, micro_batches: list[Batch], agreement: Agreement, advance: Callable) -> None:
        started = time.perf_counter()
        step, steps, world_size = self.state.step, self.plan.steps, self.runtime.world_size
        multiplier = self.plan.lr_multiplier(step / steps if steps else agreement.data_progress)
        self.micro_step.loss.zero_()
        for number, batch in enumerate(micro_batches, 1):
            # every target has the same weight in the step; world_size undoes the mean over ranks in the exchange
            weight = int((batch.targets != -1).sum()) * world_size / agreement.targets
            self.micro_step(batch, weight, last=number == len(micro_batches))
        norm = self.optimizer.synchronize()
        # the only wait for the device in a step; the weights are not touched before loss and norm are known to be finite
        rank_loss, grad_norm = self.runtime.read(torch.stack([self.micro_step.loss, norm]))
        loss = self.runtime.sum([rank_loss])[0] / world_size
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                self._stop_not_finite(f"the {what} is {value}", micro_batches)
        self.optimizer.update(multiplier, self.plan.momentum(step))
        seconds = self.taking + time.perf_counter() - started
        tokens = sum(batch.inputs.numel() for batch in micro_batches) * world_size
        self.state.advance(loss, tokens, seconds, micro_batches[-1].position)
        done = self.state.step / steps if steps else agreement.data_progress
        more = self.plan.measured()
        if self.runtime.primary:
            started = time.perf_counter()
            advance(completed=done, state=self._report(grad_norm, multiplier, tokens, seconds, done, more))
            self.logging = time.perf_counter() - started

    def _report(
        self, grad_norm: float, multiplier: float, tokens: int, seconds: float, done: float, more: dict[str, float]
    ) -> str:
        """Write the record of the step that has just ended; returns what there is to say about it."""
        step, rate, peak = self.state.step - 1, tokens / seconds, self.runtime.peak_flops
        mfu = self.model.config.flops_per_token * rate / (peak * self.runtime.world_size) if peak else None
        remaining = self.pace.remaining(seconds, done)
        self.metrics.write(
            {
                "step": step,
                "loss": self.state.loss,
                "grad_norm": grad_norm,
                "lr_multiplier": multiplier,
                "dt": seconds,
                "data_s": self.taking,  # of dt
                "log_s": self.logging,  # of the record before
                "tokens_per_second": rate,
                "mfu": mfu,
                "tokens": self.state.tokens,
                "elapsed": self.state.elapsed,
                "progress": done,
                "remaining": remaining,
                **more,
            }
        )
        said = [
            f"step {step}" + (f"/{self.plan.steps}" if self.plan.steps else f" ({100 * done:.1f} %)"),
            f"loss {self.state.loss:.4f}",
            f"{'–' if remaining is None else format_duration(remaining, clock=True)} left",
            f"{rate:,.0f} tokens/s",
            f"learning rate × {multiplier:.2f}",
            *(f"{name.replace('_', ' ')} {value:.4g}" for name, value in more.items()),
        ]
        return " | ".join([*said, f"mfu {100 * mfu:.1f} %"] if mfu else said)

    def _summary(self) -> dict:
        state = self.state
        return self.results | {
            "steps": state.step,
            "tokens": state.tokens,
            "loss": state.loss,
            "train_seconds": state.elapsed,
            "earlier_seconds": state.earlier_seconds,
            "tokens_per_second": state.tokens / state.elapsed if state.elapsed else 0.0,
        }

    def _stop_not_finite(self, problem: str, micro_batches: list[Batch]) -> NoReturn:
        last = self.store.path(self.saved_step) if self.saved_step >= 0 else "none"
        raise UserError(
            f"step {self.state.step} of {self.plan.stage}: {problem}; offending tensor: "
            f"{offending_tensor(self.model, micro_batches, self.runtime.device)}; last good checkpoint: {last}; "
            "lower the learning rates or check the data, then run the same command again"
        )
