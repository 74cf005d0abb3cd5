"""Chat tasks: multiple choice by the logits of the letters, all others by generating; ChatCORE over all tasks."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from nanochat.checkpoint import load_model
from nanochat.evaluate.answers import sample_answers
from nanochat.evaluate.scope import scope_of
from nanochat.evaluate.scores import Score, as_results, write_csv
from nanochat.evaluate.scoring import groups_of, logits_at
from nanochat.gpt import GPT
from nanochat.inference.engine import Engine
from nanochat.inference.session import Session, shown
from nanochat.options.evaluate import NOT_REPORTED, SAMPLES, ChatTaskOptions, EvaluateChatOptions
from nanochat.platform.console import progress, say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths, steps_in
from nanochat.tasks import ARC, GSM8K, MMLU, HumanEval, SpellingBee
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.tokenizer.chat_format import render_prompt

SPELLING_TESTS = 256
TASKS: dict[str, Callable[[Paths], object]] = {
    "ARC-Easy": lambda paths: ARC(paths, "ARC-Easy", "test"),
    "ARC-Challenge": lambda paths: ARC(paths, "ARC-Challenge", "test"),
    "MMLU": lambda paths: MMLU(paths, "test"),
    "GSM8K": lambda paths: GSM8K(paths, "test"),
    "HumanEval": lambda paths: HumanEval(paths),
    "SpellingBee": lambda paths: SpellingBee(paths, "test", SPELLING_TESTS),
}
SAMPLE_TOKENS = 128  # at most, of an answer that the report shows
BENCHMARKS = ("CORE", *TASKS, "ChatCORE")


def shown_name(name: str, embedded: bool) -> str:
    """The name of a result as people read it: that of a benchmark, if the embedded data have a test in its place, says so."""
    task = re.split("[:,]", name)[0]  # "GSM8K: did not fit", "GSM8K, any of 16"
    return f"{task} stand-in{name[len(task) :]}" if embedded and task in BENCHMARKS else name


def chat_accuracies(
    model: GPT,
    tokenizer: Tokenizer,
    paths: Paths,
    runtime: Runtime,
    options: ChatTaskOptions,
    names: tuple[str, ...] = tuple(TASKS),
) -> dict[str, float | str]:
    """The accuracy of each task by its name, what there is to say about it, and "ChatCORE", if all tasks were measured by the most
    likely answers."""
    scores, notes = chat_scores(model, tokenizer, paths, runtime, options, names)
    return as_results(scores, mean_of(names, options)) | notes


def mean_of(names: tuple[str, ...], options: ChatTaskOptions) -> str:
    """The name of the mean over these tasks: ChatCORE if they are all that there are and no answer was sampled, else empty."""
    return "ChatCORE" if set(names) == set(TASKS) and not options.conditions else ""


def chat_scores(
    model: GPT,
    tokenizer: Tokenizer,
    paths: Paths,
    runtime: Runtime,
    options: ChatTaskOptions,
    names: tuple[str, ...],
    engine: Callable[[], Engine] | None = None,
) -> tuple[list[Score], dict[str, str]]:
    """The score of each task; and in words, by name, how many answers did not fit into the model's positions, which count as wrong,
    and under what conditions a task was judged. engine: returns the one that generates; by default, one of its own."""
    scores: list[Score] = []
    notes: dict[str, str] = {}
    engine = engine or engine_of(model, tokenizer)
    for name in names:
        task = TASKS[name](paths)
        count = len(task) if options.max_per_task < 0 else min(len(task), options.max_per_task)
        groups = groups_of(count, runtime)
        with progress(
            f"evaluate {shown_name(name, paths.reads_embedded)}", sum(map(len, groups)), quiet=not runtime.primary
        ) as advance:
            if task.kind == "categorical":
                verdicts = _categorical(model, tokenizer, task, groups, advance)
            else:
                verdicts = _generative(engine(), task, groups, options, advance)
        right, unfit = runtime.sum([float(verdicts.count(True)), float(verdicts.count(None))])
        if task.kind == "generative" and options.conditions:
            name = f"{name}, {options.conditions}"
        scores.append(Score(name, right / count, task.baseline))
        if unfit:
            notes[f"{name}: did not fit"] = f"{unfit:.0f} of {count}, counted as wrong"
        if hasattr(task, "conditions"):
            notes |= task.conditions()
    return scores, notes


def engine_of(model: GPT, tokenizer: Tokenizer) -> Callable[[], Engine]:
    """A function that makes one engine, whose graphs are captured once, when it is first called."""
    return cache(lambda: Engine(model, tokenizer))


def _categorical(model: GPT, tokenizer: Tokenizer, task, groups: list[range], advance) -> list[bool | None]:
    """Whether each answer is right."""
    verdicts: list[bool | None] = []
    for group in groups:
        conversations = [task[index] for index in group]
        prompts = [render_prompt(tokenizer, conversation) for conversation in conversations]
        spans = [(len(prompt), len(prompt) + 1) for prompt in prompts]  # the token after the prompt
        for conversation, logits in zip(conversations, logits_at(model, prompts, spans, advance), strict=True):
            letters = conversation["letters"]
            ids = [tokenizer.encode(letter)[0] for letter in letters]
            verdicts.append(task.judge(conversation, letters[int(logits[0, ids].argmax())]))
    return verdicts


def _generative(engine: Engine, task, groups: list[range], options: ChatTaskOptions, advance) -> list[bool | None]:
    """Whether one of the answers to each item is right; None where all were cut off by the end of the model's positions."""
    verdicts: list[bool | None] = []
    indices = [index for group in groups for index in group]
    for answers in judged_answers(engine, task, indices, options):
        unfit = all(right is None for right in answers)
        verdicts.append(None if unfit else any(answers))
        advance()
    return verdicts


def judged_answers(
    engine: Engine, task, indices: Sequence[int], options: ChatTaskOptions
) -> Iterator[list[bool | None]]:
    """For each item, in order, whether each of its answers is right; None where the model's positions ended before the prompt or the
    answer did."""
    tokenizer = engine.tokenizer
    conversations = [task[index] for index in indices]
    prompts = [render_prompt(tokenizer, conversation) for conversation in conversations]
    fitting = [n for n, prompt in enumerate(prompts) if len(prompt) < engine.positions]
    answers = sample_answers(
        engine,
        [prompts[n] for n in fitting],
        options.num_samples,
        options.rows,
        options.max_tokens,
        seed=42,
        temperature=options.temperature,
        top_k=options.top_k,
        numbers=[indices[n] for n in fitting],  # the same for any number of processes
    )
    for conversation, prompt in zip(conversations, prompts, strict=True):
        if len(prompt) >= engine.positions:
            yield [None] * options.num_samples
            continue
        yield [
            task.judge(conversation, tokenizer.decode(answer.tokens))
            if len(prompt) + len(answer.tokens) < engine.positions
            else None
            for answer in next(answers)
        ]


def evaluate_chat(options: EvaluateChatOptions, paths: Paths, runtime: Runtime) -> dict[str, float | str | list]:
    """`nanochat evaluate chat`: evaluate a checkpoint of a stage; returns accuracies, and on the first rank answers to sample prompts.

    Results that the report does not show, of an older checkpoint, of sampled answers, or of less than it has, come with the reason as
    NOT_REPORTED. Raises UserError for unknown tasks, and for several answers that would all be the same.
    """
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}; choose from: {', '.join(TASKS)}")
    sampling = options.task_options
    if sampling.num_samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"--num-samples {sampling.num_samples} at --temperature 0 would be as many times the same answer; give a temperature"
        )
    model, tokenizer, meta = load_model(paths, options.stage, runtime, options.impl, options.checkpoint)
    names = tuple(dict.fromkeys(options.tasks or TASKS))
    engine = engine_of(model, tokenizer)
    scores, notes = chat_scores(model, tokenizer, paths, runtime, sampling, names, engine)
    scope = scope_of(options, "evaluate chat", paths, TASKS)
    mean = "" if scope.less else mean_of(names, sampling)
    results = as_results(scores, mean)
    if not runtime.primary:
        return results
    say_accuracies(results | notes, paths)
    if paths.writable:
        suffix = scope.suffix
        suffix += f"_{sampling.num_samples}-answers_temperature-{sampling.temperature:g}" if sampling.conditions else ""
        write_csv(
            paths.report / f"{options.stage}-eval_{meta['step']:06d}{suffix}.csv",
            scores,
            {mean: results[mean]} if mean else {},
        )
    results |= notes
    older, sampled = not_newest(paths, options.stage, meta["step"]), sampling.conditions and "the answers were sampled"
    if reason := older or sampled or scope.kept:
        return results | {NOT_REPORTED: reason}
    return results | {SAMPLES: [_sample(engine(), prompt) for prompt in options.sample_prompts]}


def not_newest(paths: Paths, stage: str, step: int) -> str:
    """That a checkpoint is not the newest of its stage, which is the one that the report shows; empty if it is."""
    newest = max(steps_in(paths.checkpoints(stage)))
    return f"the newest checkpoint of {stage} is that of step {newest}, not {step}" if step != newest else ""


def _sample(engine: Engine, prompt: str) -> dict[str, str]:
    """A question with the model's most likely answer."""
    try:
        answer = "".join(shown(Session(engine, SAMPLE_TOKENS, temperature=0.0).ask(prompt)))
    except UserError as error:  # the question is too long: no reason to lose what was measured
        answer = f"({error})"
    return {"you": prompt, "nanochat": answer}


def say_accuracies(results: dict[str, float | str], paths: Paths) -> None:
    """Print a line for each result."""
    for name, value in results.items():
        name = shown_name(name, paths.reads_embedded)
        say(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
