"""CORE: the in-context tasks of an evaluation bundle (core.yaml, eval_meta_data.csv, eval_data/*.jsonl).

An item is right when
  multiple_choice    the right choice has the smallest mean loss,
  schema             the common continuation has the smallest mean loss after the right context,
  language_modeling  every token of the continuation is the most likely one.
A task's score is (accuracy − baseline) / (1 − baseline), with the accuracy of guessing as its baseline. CORE is the mean of
the scores. Li et al. 2024 (DCLM).
"""

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch.nn.functional as F
import yaml
from torch import Tensor, tensor

from nanochat.evaluate.scores import Score, as_results
from nanochat.evaluate.scoring import groups_of, logits_at
from nanochat.gpt import GPT
from nanochat.platform.console import progress
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_json_lines, read_shape
from nanochat.platform.shapes import check_shape
from nanochat.tokenizer.bpe import Tokenizer

KEYS = {
    "multiple_choice": {"query": str, "choices": [str], "gold": int},
    "schema": {"context_options": [str], "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
LISTING = {"icl_tasks": [{"label": str, "icl_task_type": str, "dataset_uri": str, "num_fewshot": [int]}]}


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle, with its items and the number of solved examples (shots) in front of each."""

    label: str
    kind: str
    shots: int
    delimiter: str
    items: list[dict]
    baseline: float  # accuracy of guessing


def load_bundle(directory: Path) -> list[CoreTask]:
    """The tasks of a bundle. Raises UserError when one of its files is missing or malformed."""
    listing, meta = directory / "core.yaml", directory / "eval_meta_data.csv"
    for path in (listing, meta):
        if not path.exists():
            raise UserError(f"{path} does not exist; make the embedded bundle with: nanochat data generate")
    baselines, tasks = _read_baselines(meta), []
    for number, entry in enumerate(read_shape(listing, LISTING, _parse_yaml)["icl_tasks"]):
        label, kind, delimiter = entry["label"], entry["icl_task_type"], entry.get("continuation_delimiter", " ")
        check_shape(delimiter, str, f"{listing}['icl_tasks'][{number}]['continuation_delimiter']")
        if kind not in KEYS:
            raise UserError(f"{listing}: task {label} has the unknown type {kind!r}; known: {', '.join(KEYS)}")
        if label not in baselines:
            raise UserError(f"{meta} has no random baseline for the task {label}")
        if not entry["num_fewshot"] or entry["num_fewshot"][0] < 0:
            raise UserError(f"{listing}: task {label} has num_fewshot {entry['num_fewshot']}, wanted [0] or more")
        path = directory / "eval_data" / entry["dataset_uri"]
        lines = read_json_lines(path)
        for line, item in lines:
            _check_item(item, KEYS[kind], f"{path}, line {line}")
        items = [item for _, item in lines]
        if not items:
            raise UserError(f"{path} has no items; fetch or generate the bundle again")
        tasks.append(CoreTask(label, kind, entry["num_fewshot"][0], delimiter, items, baselines[label]))
    if not tasks or len({task.label for task in tasks}) < len(tasks):
        raise UserError(f"{listing} has {len(tasks)} tasks, wanted one or more with labels of their own")
    return tasks


def _parse_yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:  # also a tag, which would make an object of Python
        raise ValueError(f"no plain YAML: {error}") from error


def _read_baselines(path: Path) -> dict[str, float]:
    """The accuracy of guessing, by the label of the task, from percentages."""
    baselines = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            for row in rows:
                label, percent = row["Eval Task"], float(row["Random baseline"])
                if not 0 <= percent < 100:
                    raise ValueError(f"line {rows.line_num}: {percent} is no percentage below 100")
                baselines[label] = percent / 100
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} needs the columns 'Eval Task' and 'Random baseline' with percentages ({error!r})"
        ) from error
    return baselines


def _check_item(item: object, keys: dict, place: str) -> None:
    check_shape(item, keys, place)
    answers = item.get("choices", item.get("context_options"))
    if "gold" in keys and not 0 <= item["gold"] < len(answers):
        raise UserError(f"{place} has {len(answers)} answers, of which {item['gold']} is not the number of one")


def evaluate_core(
    model: GPT, tokenizer: Tokenizer, directory: Path, runtime: Runtime, max_per_task: int = -1
) -> dict[str, float]:
    """The accuracy of each task by its label, and "CORE". max_per_task: items of each task, negative for all."""
    return as_results(core_scores(model, tokenizer, load_bundle(directory), runtime, max_per_task), "CORE")


def core_scores(
    model: GPT, tokenizer: Tokenizer, tasks: list[CoreTask], runtime: Runtime, max_per_task: int = -1
) -> list[Score]:
    """The score of each task. max_per_task: items of each task, negative for all."""
    return [
        Score(task.label, evaluate_task(model, tokenizer, task, runtime, max_per_task), task.baseline) for task in tasks
    ]


def evaluate_task(model: GPT, tokenizer: Tokenizer, task: CoreTask, runtime: Runtime, max_per_task: int = -1) -> float:
    """The accuracy on a task, whose items the ranks share; unless max_per_task is negative, on that many items, chosen by a
    fixed shuffle."""
    items = list(task.items)
    random.Random(1337).shuffle(items)
    if max_per_task >= 0:
        items = items[:max_per_task]
    groups = groups_of(len(items), runtime)
    with progress(f"evaluate {task.label}", sum(map(len, groups)), quiet=not runtime.primary) as advance:
        right = sum(_right(model, tokenizer, task, items, group, advance) for group in groups)
    [right] = runtime.sum([float(right)])
    return right / len(items)


def _right(model: GPT, tokenizer: Tokenizer, task: CoreTask, items: list[dict], group: range, advance: Callable) -> int:
    """How many items of a group are right."""
    prepared = [_sequences(task, items, index, tokenizer) for index in group]
    flat = [sequence for sequences, _ in prepared for sequence in sequences]
    spans = [span for _, item_spans in prepared for span in item_spans]
    scores = (
        _score(logits, sequence[start:end])
        for logits, sequence, (start, end) in zip(logits_at(model, flat, spans), flat, spans, strict=True)
    )
    right = 0
    for index, (sequences, _) in zip(group, prepared, strict=True):
        options = list(islice(scores, len(sequences)))
        if task.kind == "language_modeling":
            right += options[0][1]
        else:
            right += min(range(len(options)), key=lambda i: options[i][0]) == items[index]["gold"]
    advance(len(group))
    return right


def _score(logits: Tensor, tokens: list[int]) -> tuple[float, bool]:
    """The mean loss of the tokens in nats, and whether each of them is the most likely one."""
    targets = tensor(tokens[-logits.size(0) :], device=logits.device)
    return F.cross_entropy(logits, targets).item(), bool((logits.argmax(-1) == targets).all())


def _sequences(
    task: CoreTask, items: list[dict], index: int, tokenizer: Tokenizer
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The token sequences of an item, with its shots in front, and the span of each sequence that is scored."""
    others = [i for i in range(len(items)) if i != index]
    chosen = random.Random(1234 + index).sample(others, min(task.shots, len(others)))
    shots = "".join(f"{_solved(task, items[i])}\n\n" for i in chosen)
    item = items[index]

    def encode(text: str) -> list[int]:
        return [tokenizer.bos, *tokenizer.encode(text)]

    if task.kind == "multiple_choice":
        sequences = [encode(f"{shots}{item['query']}{task.delimiter}{choice}") for choice in item["choices"]]
        start = _common_prefix(sequences)  # the choices may share their first tokens
        return sequences, [(min(start, len(s) - 1), len(s)) for s in sequences]
    if task.kind == "schema":
        tail = f"{task.delimiter}{item['continuation']}"
        sequences = [encode(f"{shots}{context}{tail}") for context in item["context_options"]]
        length = max(1, _common_prefix([s[::-1] for s in sequences]))
        return sequences, [(max(1, len(s) - length), len(s)) for s in sequences]
    prompt = f"{shots}{item['context'].strip()}{task.delimiter}"
    whole = encode(f"{prompt}{item['continuation']}")
    start = _common_prefix([encode(prompt.rstrip()), whole])
    return [whole], [(min(start, len(whole) - 1), len(whole))]


def _solved(task: CoreTask, item: dict) -> str:
    """The text of an item with its right answer."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    context = item["context_options"][item["gold"]] if task.kind == "schema" else item["context"].strip()
    return f"{context}{task.delimiter}{item['continuation']}"


def _common_prefix(sequences: list[list[int]]) -> int:
    """The number of tokens that all sequences begin with."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
