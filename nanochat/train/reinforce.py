"""Reinforcement learning on GSM8K: the model answers each question several times, and learns from its own answers.

An answer has the reward 1 if its number is right, else 0; its advantage A is the reward minus the mean reward of the answers to its
question. With the tokens y that the model chose, the loss of a step is

    −(1/N) Σ A·log p(y | tokens before),    N tokens in all of its answers.

This is REINFORCE (Williams 1992) with a baseline. Every answer is of the model as it is, so that there is no ratio to the probabilities
of an older model. p is over the whole vocabulary at temperature 1. Sampling differs from that where top-k cuts off the tail, and at
other temperatures; the loss does not correct it. Tokens that the calculator forced are not targets. Nor is the token that ends an
answer, which the engine does not return.
"""

import time
from collections.abc import Iterator

import torch

from nanochat.checkpoint import CheckpointStore, create_model, find_checkpoint, weights_hash
from nanochat.data.batches import Batch
from nanochat.data.fingerprint import fingerprint
from nanochat.data.positions import conversation_position
from nanochat.data.splits import digest
from nanochat.evaluate.answers import Answer, pass_at, sample_answers
from nanochat.evaluate.chat import judged_answers
from nanochat.gate import take_gate
from nanochat.gpt import GPTConfig
from nanochat.inference.engine import Engine
from nanochat.optim import MuonAdamW
from nanochat.options.evaluate import ChatTaskOptions
from nanochat.options.train import TrainRlOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tasks import GSM8K
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.tokenizer.chat_format import render_prompt
from nanochat.train.plan import Evaluation, Plan, learning_settings, step_size
from nanochat.train.schedules import full_momentum, linear_decay
from nanochat.train.trainer import Trainer


class Rollouts:
    """The batches of training: the answers of the model to this process's questions, in micro-batches.

    questions: of each step, for this process.
    """

    def __init__(self, engine: Engine, task: GSM8K, options: TrainRlOptions, questions: int, runtime: Runtime):
        self.engine, self.task, self.options, self.questions, self.runtime = engine, task, options, questions, runtime
        self.count = len(task) if options.gsm8k < 0 else min(len(task), options.gsm8k)
        self.seconds, self.rewards, self.tokens = 0.0, [], 0  # of the newest step, on this process

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step; the last one may have fewer rows."""
        return -(-self.questions * self.options.num_samples // self.options.device_batch_size)

    def batches(self, used: int) -> Iterator[Batch]:
        """Micro-batches without end. used: questions that this process has answered before."""
        while True:
            yield from self._step(used)
            used += self.questions

    def measured(self) -> dict[str, float]:
        """Mean reward and length of the answers of the newest step, and answers per second, over all processes."""
        count, [reward, tokens] = len(self.rewards), self.runtime.sum([sum(self.rewards), float(self.tokens)])
        count *= self.runtime.world_size
        rate = count / max(self.runtime.gather(self.seconds))
        return {"reward": reward / count, "answer_tokens": tokens / count, "samples_per_second": rate}

    def _step(self, used: int) -> Iterator[Batch]:
        """The micro-batches of a step, whose answers are generated at once."""
        started, tokenizer, options = time.perf_counter(), self.engine.tokenizer, self.options
        rank, world_size = self.runtime.rank, self.runtime.world_size
        numbers = [number * world_size + rank for number in range(used, used + self.questions)]
        conversations = [self.task[number % self.count] for number in numbers]
        prompts = [render_prompt(tokenizer, conversation) for conversation in conversations]
        answers = sample_answers(
            self.engine,
            prompts,
            options.num_samples,
            options.sample_rows,
            options.max_tokens,
            seed=digest("rl", options.seed, numbers[0]) >> 2,
            temperature=options.temperature,
            top_k=options.top_k,
        )
        rows: list[tuple[list[int], Answer, float]] = []
        self.rewards, self.tokens = [], 0
        for conversation, prompt, samples in zip(conversations, prompts, answers, strict=True):
            rewards = [float(self.task.judge(conversation, tokenizer.decode(answer.tokens))) for answer in samples]
            mean = sum(rewards) / len(rewards)
            rows += [(prompt, answer, reward - mean) for answer, reward in zip(samples, rewards, strict=True)]
            self.rewards += rewards
            self.tokens += sum(len(answer.tokens) for answer in samples)
        self.seconds = time.perf_counter() - started
        for first in range(0, len(rows), options.device_batch_size):
            yield batch_of(rows[first : first + options.device_batch_size], (used + self.questions,))


def batch_of(rows: list[tuple[list[int], Answer, float]], position: tuple[int, ...]) -> Batch:
    """A batch from prompts, answers and their advantages; the targets are the tokens that the model chose."""
    width = max(len(prompt) + len(answer.tokens) for prompt, answer, _ in rows) - 1
    inputs, targets = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -1)
    weights = torch.zeros(len(rows), width)
    for row, (prompt, answer, advantage) in enumerate(rows):
        tokens, chosen = torch.tensor([*prompt, *answer.tokens]), torch.tensor(answer.sampled, dtype=torch.bool)
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        span = slice(len(prompt) - 1, len(tokens) - 1)
        targets[row, span] = torch.where(chosen, tokens[len(prompt) :], -1)
        weights[row, span] = advantage
    return Batch(inputs, targets, position, loss_weight=weights)


def reinforce(options: TrainRlOptions, paths: Paths, runtime: Runtime) -> dict:
    """`nanochat train rl`: run or resume reinforcement learning, from the newest checkpoint of its source; returns its results.

    Raises UserError for settings with which all answers to a question are the same, and for a question that is too long.
    """
    if options.temperature == 0 or options.top_k == 1:
        raise UserError(
            f"with --temperature {options.temperature:g} and --top-k {options.top_k} all answers to a question are the same, and "
            "nothing is learned; give a temperature above 0, such as 1, and a top-k above 1, such as 50"
        )
    path, tokenizer, source_meta = find_checkpoint(paths, options.source, runtime)
    shape = GPTConfig(**source_meta["config"], impl=options.impl, recompute=options.run.recompute)
    store = CheckpointStore(paths.checkpoints("rl"), runtime)
    questions, total = step_size(options, "rl", 1, store)[1:]
    shape, micro_step_ms = take_gate(paths, shape, options.device_batch_size, runtime, options.run.deterministic)
    task, tests = GSM8K(paths, "train"), GSM8K(paths, "test")
    model = create_model(path, shape, runtime, source_meta)
    optimizer = MuonAdamW(model, options.optimizer)
    engine = Engine(model, tokenizer)
    rollouts = Rollouts(engine, task, options, questions, runtime)
    steps = rollouts.count * options.num_epochs // total
    if steps < 1:
        raise UserError(
            f"{rollouts.count} questions do not fill one step of {total}; lower --examples-per-step, or raise --num-epochs"
        )
    longest = longest_prompt(task, rollouts.count, tokenizer, engine.positions)
    if runtime.primary:
        say(f"{steps:,} steps of {total} questions with {options.num_samples} answers each")

    def batches(positions: list | None) -> Iterator[Batch]:
        [used] = conversation_position(positions, runtime.rank, runtime.world_size) if positions else (0,)
        return rollouts.batches(used)

    plan = Plan(
        stage="rl",
        batches=batches,
        rows=options.device_batch_size,
        accumulation=rollouts.micro_batches,
        lr_multiplier=linear_decay(options.init_lr_fraction),
        momentum=full_momentum,
        steps=steps,
        one_length=False,
        ahead=False,
        measured=rollouts.measured,
        cache_bytes=engine.cache_bytes(options.sample_rows, longest + options.max_tokens),
        evaluations=[Evaluation(options.eval_every, lambda: pass_rates(engine, tests, options, runtime), first=True)],
    )
    settings = learning_settings(options) | {f"{options.source}_step": source_meta["step"], "questions": rollouts.count}
    settings |= {"step_size": total, "first_weights": weights_hash(source_meta)}
    settings["data"] = fingerprint(task.files, paths.hashes, runtime)
    trainer = Trainer(plan, model, optimizer, tokenizer, paths, runtime, options.run, settings, micro_step_ms)
    return {"questions": rollouts.count} | trainer.run()


def longest_prompt(task: GSM8K, count: int, tokenizer: Tokenizer, positions: int) -> int:
    """The tokens of the longest of the first `count` prompts. Raises UserError for one that leaves no position for an answer."""
    longest = 0
    for index in range(count):
        tokens = len(render_prompt(tokenizer, task[index]))
        if tokens >= positions:
            raise UserError(
                f"{task.place(index)}: a prompt of {tokens} tokens leaves none of the model's {positions} positions for an answer; "
                "shorten the question, or remove it"
            )
        longest = max(longest, tokens)
    return longest


def pass_rates(engine: Engine, task: GSM8K, options: TrainRlOptions, runtime: Runtime) -> dict[str, float]:
    """The share of questions of which k answers solve one, as "pass@k", for k from 1 to options.eval_samples."""
    count = len(task) if options.eval_examples < 0 else min(len(task), options.eval_examples)
    samples = options.eval_samples
    sampling = ChatTaskOptions(
        max_tokens=options.max_tokens, rows=options.sample_rows, num_samples=samples, temperature=options.temperature,
        top_k=options.top_k,
    )  # fmt: skip
    mine = range(runtime.rank, count, runtime.world_size)
    right = [answers.count(True) for answers in judged_answers(engine, task, mine, sampling)]
    sums = runtime.sum([sum(pass_at(k, n, samples) for n in right) for k in range(1, samples + 1)])
    return {f"pass@{k}": passed / count for k, passed in enumerate(sums, 1)}
