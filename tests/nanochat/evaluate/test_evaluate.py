"""Evaluators against answers known beforehand."""

import contextlib
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from nanochat.data.batches import Batch
from nanochat.evaluate import core
from nanochat.evaluate.bits_per_byte import bits_per_byte, mean_loss, unigram_bits_per_byte
from nanochat.evaluate.chat import chat_accuracies
from nanochat.evaluate.core import CoreTask, evaluate_core, evaluate_task, load_bundle
from nanochat.evaluate.scoring import groups_of, logits_at
from nanochat.gpt import GPTConfig
from nanochat.inference.engine import Token
from nanochat.options.evaluate import ChatTaskOptions
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.tokenizer.chat_format import render, render_prompt
from tests.nanochat.models import perturbed


@pytest.fixture(scope="module")
def model(tokenizer):
    return perturbed(GPTConfig(2, 64, 4, 2, tokenizer.vocab_size, 64))


class Oracle:
    """A model that knows one text by heart: it expects each token of it after the three before, else token 0."""

    def __init__(self, vocab_size: int, texts: list[list[int]], context_length: int = 512):
        self.config, self.positions = SimpleNamespace(context_length=context_length), 10 * context_length
        self.texts, self.vocab_size, self.device = texts, vocab_size, torch.device("cpu")

    def hidden(self, tokens):
        self.tokens = tokens
        rows, length = tokens.shape
        return torch.arange(rows)[:, None, None] * 100_000 + torch.arange(length)[None, :, None]

    def logits(self, where):
        out = torch.zeros(len(where), self.vocab_size)
        for i, code in enumerate(where.flatten().tolist()):
            seen = self.tokens[code // 100_000, 1 : code % 100_000 + 1].tolist()  # behind bos
            for text in self.texts:
                for start in range(len(text)):
                    tail = seen[-3:]
                    if text[start : start + len(tail)] == tail and start + len(tail) < len(text):
                        out[i, text[start + len(tail)]] = 10.0
        return out


@pytest.mark.parametrize("at_once", [1, 128, 16384])
def test_logits_at_positions_equal_the_whole_forward_pass(model, monkeypatch, at_once):
    """Longer than the context too; only what exceeds the positions of the model is cut."""
    monkeypatch.setattr("nanochat.evaluate.scoring.TOKENS_AT_ONCE", at_once)
    lengths = (5, 40, 64, 90, 640, 700, 3)
    sequences = [torch.randint(500, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    spans = [(1, 5), (12, 20), (60, 64), (85, 90), (1, 30), (690, 700), (1, 3)]
    assert model.positions == 640
    for sequence, (start, end), logits in zip(sequences, spans, logits_at(model, sequences, spans), strict=True):
        kept = sequence[-640:]
        gone = len(sequence) - len(kept)
        whole = model(torch.tensor([kept]))[0]
        torch.testing.assert_close(logits, whole[start - 1 - gone : end - 1 - gone], rtol=1e-4, atol=1e-4)


def test_bits_per_byte_counts_only_targets_with_bytes(model, cpu):
    token_bytes = np.zeros(model.config.vocab_size, dtype=np.int32)
    token_bytes[:100] = 3
    targets = torch.tensor([[5, 50, 200, -1, 7]])
    inputs = torch.tensor([[1, 2, 3, 4, 5]])
    losses = model(inputs, targets, reduction="none")[0]
    expected = (losses[0] + losses[1] + losses[4]).item() / (math.log(2) * 9)
    assert bits_per_byte(model, [Batch(inputs, targets, ())], token_bytes, cpu) == pytest.approx(expected, rel=1e-5)


def test_the_mean_loss_is_over_the_targets_of_all_ranks(model):
    tokens = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ())
    own = mean_loss(model, [batch], Runtime(0, 1, torch.device("cpu"), torch.float32))
    another = SimpleNamespace(device=torch.device("cpu"), sum=lambda values: [values[0] + 8.0, values[1] + 16.0])
    assert mean_loss(model, [batch], another) == pytest.approx((16 * own + 8) / 32)


def test_unigram_baseline_counts_the_batches_of_all_ranks(cpu, monkeypatch):
    token_bytes = np.array([1, 2, 0])
    train = [Batch(torch.zeros(0), torch.tensor([[0, 0, 0, 1]]), ())]  # counts with one added: 4, 2, 1
    val = [Batch(torch.zeros(0), torch.tensor([[0, 1, 2]]), ())]
    expected = (-math.log2(4 / 7) - math.log2(2 / 7)) / 3
    assert unigram_bits_per_byte(train, val, token_bytes, cpu) == pytest.approx(expected)
    of_another_rank = iter(([3, 1, 0], [1, 1, 1]))
    monkeypatch.setattr(
        Runtime, "sum", lambda self, mine: [a + b for a, b in zip(mine, next(of_another_rank), strict=True)]
    )
    assert unigram_bits_per_byte([], [], token_bytes, cpu) == pytest.approx(expected)


ITEMS = {
    "multiple_choice": [{"query": f"Q{i}:", "choices": ["red", "blue", "green"], "gold": i % 3} for i in range(6)],
    "schema": [
        {"context_options": [f"The cat {i}", f"The dog {i}"], "continuation": "sleeps well.", "gold": i % 2}
        for i in range(6)
    ],
    "language_modeling": [{"context": f"Number {i} ", "continuation": chr(97 + i) * 3} for i in range(6)],
}


def text_of(kind: str, item: dict) -> str:
    if kind == "multiple_choice":
        return f"{item['query']} {item['choices'][item['gold']]}"
    if kind == "schema":
        return f"{item['context_options'][item['gold']]} {item['continuation']}"
    return f"{item['context'].strip()} {item['continuation']}"


@pytest.mark.parametrize("kind", list(ITEMS))
@pytest.mark.parametrize("shots", [0, 2, 50])
def test_core_scores_what_the_model_knows(tokenizer, cpu, kind, shots):
    items = ITEMS[kind]
    known = [tokenizer.encode(text_of(kind, item)) for item in items]
    task = CoreTask("task", kind, shots, " ", items, 0.0)
    for share in (0, 3, 6):
        # with few-shot examples in front, an example's own text must not give another item away
        oracle = Oracle(tokenizer.vocab_size, known[:share])
        accuracy = evaluate_task(oracle, tokenizer, task, cpu)
        if kind == "language_modeling":
            assert accuracy == share / 6
        else:
            assert accuracy >= share / 6
    halves = [Runtime(r, 2, cpu.device, cpu.compute_dtype) for r in (0, 1)]
    oracle = Oracle(tokenizer.vocab_size, known)
    for half in halves:
        object.__setattr__(half, "sum", lambda values: values)
    assert sum(evaluate_task(oracle, tokenizer, task, half) for half in halves) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["core", "categorical", "generative"])
def test_items_share_batches_with_the_same_items_on_any_number_of_processes(
    tokenizer, world, cpu, model, monkeypatch, kind
):
    """What is beside a sequence in its batch changes the last bits of its logits, and so which of two choices is nearly as likely."""
    from nanochat.evaluate import chat

    items = [{"query": f"Q{i}:" * (i % 5 + 1), "choices": [f"a{i}", f"b {i}"], "gold": i % 2} for i in range(21)]
    task = Fixed(kind=kind, count=21)
    monkeypatch.setattr(chat, "TASKS", {"fixed": lambda paths: task})
    monkeypatch.setattr("nanochat.evaluate.scoring.FEWEST_IN_GROUP", 2)  # and so 2 in each group
    monkeypatch.setattr("nanochat.evaluate.scoring.TOKENS_AT_ONCE", 128)
    monkeypatch.setattr(Runtime, "sum", lambda self, values: values)

    def batches(processes: int) -> list[list]:
        found, judged = [], []
        monkeypatch.setattr(
            model, "hidden", lambda x, *_: found.append(x.tolist()) or torch.zeros(*x.shape, model.config.width)
        )
        monkeypatch.setattr(
            chat, "judged_answers", lambda engine, task, mine, options: judged.extend(mine) or [[True]] * len(mine)
        )
        for rank in range(processes):
            one = Runtime(rank, processes, cpu.device, cpu.compute_dtype)
            if kind == "core":
                evaluate_task(model, tokenizer, CoreTask("task", "multiple_choice", 1, " ", items, 0.0), one)
            else:
                chat_accuracies(model, tokenizer, world, one, ChatTaskOptions(), ("fixed",))
        assert kind != "generative" or sorted(judged) == list(range(21))
        return sorted(found)

    one = batches(1)
    assert all(batches(processes) == one for processes in (2, 3, 8))
    assert kind == "generative" or len(one) >= 11


def test_groups_are_few_and_hold_each_item_once(cpu):
    for count in (0, 1, 16, 17, 256, 400, 5000):
        for processes in (1, 3, 8):
            ranks = [
                groups_of(count, Runtime(rank, processes, cpu.device, cpu.compute_dtype)) for rank in range(processes)
            ]
            groups = sorted((group for mine in ranks for group in mine), key=lambda group: group.start)
            assert [item for group in groups for item in group] == list(range(count))
            assert max(map(len, ranks)) <= -(-max(16, count / 256) // processes) + 1


def test_tasks_share_an_engine_and_the_progress_ends_at_its_total(tokenizer, world, cpu, monkeypatch, model):
    from nanochat.evaluate import chat

    made, done = [], []

    @contextlib.contextmanager
    def progress(_, total, **options):
        moved = []
        yield lambda amount=1: moved.append(amount)
        done.append((sum(moved), total))

    monkeypatch.setattr(
        chat,
        "TASKS",
        {kind: lambda _, kind=kind: Fixed(kind=kind, count=21) for kind in ("categorical", "generative", "again")},
    )
    monkeypatch.setattr(chat, "Engine", lambda *given: made.append(given))
    monkeypatch.setattr(chat, "judged_answers", lambda engine, task, mine, options: [[True]] * len(mine))
    for module in (chat, core):
        monkeypatch.setattr(module, "progress", progress)
    chat_accuracies(model, tokenizer, world, cpu, ChatTaskOptions(), ("categorical", "generative", "again"))
    evaluate_task(model, tokenizer, CoreTask("task", "multiple_choice", 1, " ", ITEMS["multiple_choice"], 0.0), cpu)
    assert len(made) == 1 and done == [(21, 21)] * 3 + [(6, 6)]


def test_core_of_the_embedded_bundle(tokenizer, world, cpu, model):
    tasks = load_bundle(world.eval_bundle)
    assert [(t.label, t.kind, t.baseline) for t in tasks] == [
        ("world_choice", "multiple_choice", 0.25),
        ("world_completion", "language_modeling", 0.0),
        ("world_schema", "schema", 0.5),
    ]
    results = evaluate_core(model, tokenizer, world.eval_bundle, cpu, max_per_task=10)
    centred = [(results[t.label] - t.baseline) / (1 - t.baseline) for t in tasks]
    assert results["CORE"] == pytest.approx(sum(centred) / 3)


def test_a_broken_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"core.yaml does not exist.*nanochat data generate"):
        load_bundle(tmp_path)
    entry = {"label": "t", "dataset_uri": "t.jsonl", "num_fewshot": [0], "icl_task_type": "schema"}
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [entry]}))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nother,0\n")
    with pytest.raises(UserError, match="no random baseline for the task t"):
        load_bundle(tmp_path)
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nt,50\n")
    with pytest.raises(UserError, match="t.jsonl cannot be read"):
        load_bundle(tmp_path)
    (tmp_path / "eval_data").mkdir()
    item = {"context_options": ["one", "two"], "continuation": "line\u2028separated", "gold": 1}
    for line, message in (
        ("", "t.jsonl has no items"),
        ("{", "t.jsonl, line 2 is no JSON in UTF-8"),
        ("[" * 100_000, "t.jsonl, line 2 is no JSON in UTF-8"),
        (
            json.dumps(item | {"context_options": "one"}),
            r"t.jsonl, line 2\['context_options'\] is 'one', wanted a list",
        ),
        (json.dumps({"gold": 0}), "t.jsonl, line 2 has no 'context_options'"),
        (json.dumps(item | {"gold": 2}), "line 2 has 2 answers, of which 2 is not the number of one"),
        (json.dumps(item | {"gold": -1}), "line 2 has 2 answers, of which -1 is not the number of one"),
    ):
        (tmp_path / "eval_data" / "t.jsonl").write_text("\n" + line + "\n", "utf-8")
        with pytest.raises(UserError, match=message):
            load_bundle(tmp_path)
    (tmp_path / "eval_data" / "t.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", "utf-8")
    assert load_bundle(tmp_path)[0].items == [item]


# --- chat tasks ---


@dataclass
class Fixed:
    """A task of conversations whose answers are A and B."""

    name: str = "fixed"
    kind: str = "categorical"
    baseline: float = 0.25
    count: int = 4

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        answer = "AB"[index % 2]
        messages = [{"role": "user", "content": f"Which? {index}"}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "letters": ["A", "B"]}

    def judge(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"]


@pytest.mark.parametrize("kind", ["categorical", "generative"])
@pytest.mark.parametrize("known", [0, 1, 4])
def test_chat_tasks_score_what_the_model_knows(tokenizer, world, cpu, monkeypatch, kind, known):
    from nanochat.evaluate import chat

    task = Fixed(kind=kind)
    monkeypatch.setattr(chat, "TASKS", {"fixed": lambda paths: task})  # all tasks there are
    texts = [render(tokenizer, task[i])[0] for i in range(known)]
    oracle = Oracle(tokenizer.vocab_size, texts)
    if kind == "generative":
        answers = {tuple(render_prompt(tokenizer, task[i])): task[i]["messages"][-1]["content"] for i in range(known)}

        class Engine:
            positions = 512

            def __init__(self, *_):
                self.tokenizer = tokenizer

            def answers(self, prompts, max_tokens, rows, samples, **sampling):
                """In another order than the prompts."""
                assert (rows, samples) == (3, 1)
                for number, prompt in reversed(list(enumerate(prompts))):
                    tokens = tokenizer.encode(answers.get(tuple(prompt), "?"))
                    yield number, [Token(token, True, 0.0, []) for token in tokens]

        monkeypatch.setattr(chat, "Engine", Engine)
    results = chat_accuracies(oracle, tokenizer, world, cpu, ChatTaskOptions(rows=3), ("fixed",))
    guessed = (
        2 - (known + 1) // 2 if kind == "categorical" else 0
    )  # not knowing, it says A, which is right every other time
    assert results["fixed"] == (known + max(guessed, 0)) / 4
    assert results["ChatCORE"] == pytest.approx((results["fixed"] - 0.25) / 0.75)


def test_chatcore_is_given_only_for_all_tasks(tokenizer, world, cpu, monkeypatch):
    from nanochat.evaluate import chat

    monkeypatch.setattr(chat, "TASKS", {name: lambda paths: Fixed() for name in ("first", "second")})
    oracle = Oracle(tokenizer.vocab_size, [])
    arguments = (oracle, tokenizer, world, cpu, ChatTaskOptions())
    assert chat_accuracies(*arguments, ("first",)).keys() == {"first"}
    assert chat_accuracies(*arguments, ("second", "first")).keys() == {"first", "second", "ChatCORE"}


@dataclass
class Arithmetic:
    """GSM8K's kind of task; question 1 alone is nearly, and question 2 more than, as long as the model's 640 positions allow."""

    name: str = "arithmetic"
    kind: str = "generative"
    baseline: float = 0.0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        words = {1: 1254, 2: 1400}.get(index, 3)  # two are a token
        return {"messages": [{"role": "user", "content": "\n" * words}, {"role": "assistant", "content": "#### 4"}]}

    def judge(self, conversation, completion):
        return len(completion) > 0


@pytest.mark.parametrize("rows", [1, 64])
def test_an_item_that_does_not_fit_is_counted_as_wrong_and_reported(tokenizer, world, cpu, monkeypatch, model, rows):
    from nanochat.evaluate import chat

    assert (
        len(render_prompt(tokenizer, Arithmetic()[1]))
        < model.positions
        < len(render_prompt(tokenizer, Arithmetic()[2]))
    )

    class Engine(chat.Engine):
        """Says 7 for ever."""

        def _next(self, row, sampled):
            return (sampled if row.done else 7), False

    monkeypatch.setattr(chat, "Engine", Engine)
    monkeypatch.setitem(chat.TASKS, "arithmetic", lambda paths: Arithmetic())
    results = chat_accuracies(model, tokenizer, world, cpu, ChatTaskOptions(rows=rows, max_tokens=20), ("arithmetic",))
    assert results == {"arithmetic": 0.5, "arithmetic: did not fit": "2 of 4, counted as wrong"}


@pytest.mark.parametrize("reason", ["", "unshare: Operation not permitted"])
def test_the_results_tell_what_confined_generated_code(tokenizer, world, cpu, monkeypatch, model, reason):
    from nanochat.inference import sandbox

    monkeypatch.setattr(sandbox, "unsupported_reason", lambda: reason)
    results = chat_accuracies(
        model, tokenizer, world, cpu, ChatTaskOptions(max_per_task=1, max_tokens=4), ("HumanEval",)
    )
    told = "an audit hook, which holds against accidents only (unshare: Operation not permitted)"
    assert results == {
        "HumanEval": 0.0,
        "HumanEval is confined by": told if reason else "namespaces and a filter of system calls",
    }


def test_bits_per_byte_that_are_not_finite_are_an_error(cpu):
    def broken(inputs, targets, reduction):
        return torch.full(targets.shape, math.nan)

    tokens = torch.tensor([[1, 2]])
    with pytest.raises(UserError, match="the loss is nan on the text that is measured"):
        bits_per_byte(broken, [Batch(tokens, tokens, ())], np.ones(5, dtype=np.int32), cpu)


def test_bits_per_byte_of_nothing_is_not_a_number_but_an_error(model, cpu):
    with pytest.raises(UserError, match="no text to measure bits per byte on"):
        bits_per_byte(model, [], np.ones(model.config.vocab_size, dtype=np.int32), cpu)
