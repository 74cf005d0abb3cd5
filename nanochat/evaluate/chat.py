"""Chat tasks: multiple choice by the letters' logits, the others by generating at temperature 0; ChatCORE over all."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat.console import progress_bar
from nanochat.engine import Engine
from nanochat.evaluate.scoring import logits_at
from nanochat.gpt import GPT
from nanochat.paths import Paths
from nanochat.runtime import Runtime
from nanochat.tasks import ARC, GSM8K, MMLU, HumanEval, SpellingBee
from nanochat.tokenizer import Tokenizer

SPELLING_TESTS = 256
TASKS: dict[str, Callable[[Paths], object]] = {
    "ARC-Easy": lambda paths: ARC(paths, "ARC-Easy", "test"),
    "ARC-Challenge": lambda paths: ARC(paths, "ARC-Challenge", "test"),
    "MMLU": lambda paths: MMLU(paths, "test"),
    "GSM8K": lambda paths: GSM8K(paths, "test"),
    "HumanEval": lambda paths: HumanEval(paths),
    "SpellingBee": lambda paths: SpellingBee(paths, "test", SPELLING_TESTS),
}


@dataclass(frozen=True)
class ChatOptions:
    """How chat tasks are evaluated."""

    max_per_task: int = -1
    """items of each task at most; negative: all"""
    max_tokens: int = 512
    """tokens generated for an answer at most"""
    rows: int = 64
    """answers generated at once"""


def evaluate_chat(
    model: GPT,
    tokenizer: Tokenizer,
    paths: Paths,
    runtime: Runtime,
    options: ChatOptions,
    names: tuple[str, ...] = tuple(TASKS),
) -> dict[str, float]:
    """Accuracy of each task, and "ChatCORE", the mean of accuracies centred on guessing."""
    results, centred = {}, []
    for name in names:
        task = TASKS[name](paths)
        evaluate = _categorical if task.kind == "categorical" else _generative
        count = len(task) if options.max_per_task < 0 else min(len(task), options.max_per_task)
        mine = range(runtime.rank, count, runtime.world_size)
        with progress_bar(f"evaluate {name}", len(mine), quiet=not runtime.primary) as advance:
            right = evaluate(model, tokenizer, task, mine, options, advance)
        [right] = runtime.sum([float(right)])
        results[name] = right / count
        centred.append((results[name] - task.baseline) / (1 - task.baseline))
    return results | {"ChatCORE": sum(centred) / len(centred)}


def _categorical(model: GPT, tokenizer: Tokenizer, task, indices: range, options: ChatOptions, advance) -> int:
    conversations = [task[index] for index in indices]
    prompts = [tokenizer.render_prompt(conversation) for conversation in conversations]
    spans = [(len(prompt), len(prompt) + 1) for prompt in prompts]  # the token after the prompt
    right = 0
    for conversation, logits in zip(conversations, logits_at(model, prompts, spans, advance), strict=True):
        letters = conversation["letters"]
        ids = [tokenizer.encode(letter)[0] for letter in letters]
        right += task.judge(conversation, letters[int(logits[0, ids].argmax())])
    return right


def _generative(model: GPT, tokenizer: Tokenizer, task, indices: range, options: ChatOptions, advance) -> int:
    engine, right = Engine(model, tokenizer), 0
    for first in range(0, len(indices), options.rows):
        conversations = [task[index] for index in indices[first : first + options.rows]]
        prompts = [tokenizer.render_prompt(conversation) for conversation in conversations]
        answers = engine.generate(prompts, options.max_tokens, temperature=0.0)
        for conversation, answer in zip(conversations, answers, strict=True):
            right += task.judge(conversation, tokenizer.decode(answer))
            advance()
    return right
