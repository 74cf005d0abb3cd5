"""Tasks: their conversations, and how each judges a completion."""

import json
import re
import shutil
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.conversations import Limited
from nanochat.inference.calculator import calculate
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tasks import ARC, GSM8K, MMLU, HumanEval, Identity, SimpleSpelling, SmolTalk, SpellingBee
from nanochat.tasks.gsm8k import final_number, solution_parts
from nanochat.tasks.humaneval import extract_code
from nanochat.tasks.simple_spelling import SPELL_QUESTIONS
from nanochat.tasks.spelling_bee import COUNT_QUESTIONS
from tests.conftest import assert_fails_with, nanochat


def test_answers_after_the_marks():
    assert final_number("so 5\n#### 1,250.") == "1250"
    assert final_number("#### -3.5 apples") == "-3.5"
    assert final_number("#### 5\n#### 6") == "5" and final_number("#### .5") == ".5"
    for text in ("the answer is 5", "####5", "#### five", "#### ..", "####\n5"):
        assert final_number(text) is None
    parts = solution_parts("2*3 = <<2*3=6>>6\n#### 6")
    assert [(p["type"], p["text"]) for p in parts] == [
        ("text", "2*3 = "), ("python", "2*3"), ("python_output", "6"), ("text", "6\n#### 6"),
    ]  # fmt: skip
    assert extract_code("Here:\n```python\nx = 1\n```\n```python\ny\n```") == "x = 1\n"
    assert extract_code("x = 1") == "x = 1"


def test_rows_come_in_a_shuffled_order_that_is_the_same_in_every_run(world):
    """As the original shuffles them, so that its first rows are the first here too."""
    [path] = (world.chat_data / "gsm8k").glob("train*.parquet")
    questions = pq.read_table(path).column("question").to_pylist()
    order = np.random.default_rng(42).permutation(len(questions))
    task = GSM8K(world, "train")
    found = [task[i]["messages"][0]["content"] for i in range(len(task))]
    assert found == [questions[i] for i in order] and found != questions
    share = Limited(task, 5)
    assert [share[i]["messages"][0]["content"] for i in range(5)] == found[:5] and task.files == [path]


def say_again(*texts) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_identity_lines_of_every_documented_kind(base):
    """Arrays and objects, texts and lists of parts, separators of lines inside of texts, any number of lines, a mark at the start."""
    paths = Paths(base)
    parts = [{"type": "text", "text": "2*3 is "}, {"type": "python", "text": "2*3"}]
    wanted = [say_again("who\u2028are\u0085you", "a model"), say_again("2*3?", parts)]
    lines = [json.dumps(wanted[0], ensure_ascii=False), json.dumps({"messages": wanted[1]})]
    path = paths.chat_data / "identity" / "conversations.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    found = [Identity(paths)[i]["messages"] for i in range(2)]
    assert sorted(found, key=str) == sorted(wanted, key=str)


def test_copies_beside_a_split_are_not_read(base, capsys):
    """Backup copies double no rows; parts as the hub numbers them are read."""
    paths = Paths(base)
    folder = paths.chat_data / "identity"
    before = len(Identity(paths))
    shutil.copy(folder / "conversations.jsonl", folder / "conversations_backup.jsonl")
    assert len(Identity(paths)) == before
    assert "not read: " in capsys.readouterr().out
    for number in range(2):
        shutil.copy(folder / "conversations.jsonl", folder / f"conversations-0000{number}-of-00002.jsonl")
    (folder / "conversations.jsonl").unlink()
    assert len(Identity(paths)) == 2 * before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3 is no JSON in UTF-8"),
        (b'["\xff"]', "line 3 is no JSON in UTF-8"),
        (b"[" * 100_000, "line 3 is no JSON in UTF-8"),
        (b"7", "line 3: malformed conversation"),
        (
            json.dumps(say_again("half \ud83d", "b")).encode(),
            "line 3 is no JSON in UTF-8 .*surrogates not allowed",
        ),
        (
            json.dumps(say_again("a", None)).encode(),
            "line 3: malformed conversation: message 1 .assistant. must be text",
        ),
        (
            json.dumps(say_again("a", "b")[::-1]).encode(),
            "line 3: malformed conversation: message 0 is from 'assistant'",
        ),
    ],
)
def test_a_bad_identity_line_is_named_before_training_begins(base, line, message):
    paths = Paths(base)
    path = paths.chat_data / "identity" / "conversations.jsonl"
    path.write_bytes(json.dumps(say_again("a", "b")).encode() + b"\n\n" + line)
    with pytest.raises(UserError, match=message):
        Identity(paths)


def test_lines_of_conversations_are_no_table(base):
    path = Paths(base).chat_data / "gsm8k" / "train.jsonl"
    path.write_text(json.dumps(say_again("a", "b")))
    with pytest.raises(
        UserError, match="train.jsonl would be read as conversations, and gsm8k needs .* with question, answer"
    ):
        GSM8K(Paths(base), "train")


@pytest.mark.parametrize(
    ("questions", "type_of", "message"),
    [
        (["a", None, "b"], pa.string(), "row 2 has no question"),
        ([b"a"], pa.binary(), "'question' is binary, wanted texts"),
        ([b"a", b"b\xff"], None, "row 2: question is no text in UTF-8 .*0xff in position 1"),
    ],
)
def test_a_bad_value_of_a_table_is_named_before_training_begins(base, questions, type_of, message):
    path = Paths(base).chat_data / "gsm8k" / "train.parquet"
    for old in path.parent.glob("train*"):
        old.unlink()
    column = pa.array(questions, type_of) if type_of else pa.array(questions, pa.binary()).view(pa.string())
    table = {"question": column, "answer": ["#### 1"] * len(questions)}
    pq.write_table(pa.table(table), path)
    with pytest.raises(UserError, match=message):
        GSM8K(Paths(base), "train")


def test_a_malformed_conversation_in_a_table_is_named_with_its_row(base):
    path = Paths(base).chat_data / "smoltalk" / "train.parquet"
    for old in path.parent.glob("train*"):
        old.unlink()
    pq.write_table(pa.table({"messages": [say_again("a", "b"), say_again("a", "b")[::-1], say_again("c", "d")]}), path)
    with pytest.raises(UserError, match="train.parquet, row 2: malformed conversation: message 0 is from 'assistant'"):
        SmolTalk(Paths(base))


CHOICES = [["a", "b"], ["c", "d"]]
TEXTS = {"question": ["q", "r"]}
SAID = [say_again("a", "b"), say_again("c", "d")]


@pytest.mark.parametrize(
    ("source", "table", "message"),
    [
        (
            "mmlu/auxiliary_train",
            TEXTS | {"choices": CHOICES, "answer": [1, 2]},
            "row 2: the answer is choice 2 of 2, wanted",
        ),
        (
            "mmlu/auxiliary_train",
            TEXTS | {"choices": CHOICES, "answer": [-1, 0]},
            "row 1: the answer is choice -1 of 2",
        ),
        (
            "mmlu/auxiliary_train",
            TEXTS | {"choices": [["a"] * 11] * 2, "answer": [0, 0]},
            "row 1: the answer is choice 0 of 11",
        ),
        (
            "mmlu/auxiliary_train",
            TEXTS | {"choices": CHOICES, "answer": ["A", "B"]},
            "'answer' is string, wanted integers",
        ),
        (
            "mmlu/auxiliary_train",
            TEXTS | {"choices": ["ab", "cd"], "answer": [0, 1]},
            "'choices' is string, wanted lists of texts",
        ),
        (
            "mmlu/auxiliary_train",
            TEXTS | {"choices": [["a", "b"], ["c", None]], "answer": [0, 1]},
            r"row 2: choices\[1\] is 'None', wanted a text",
        ),
        (
            "arc-easy/train",
            TEXTS | {"choices": [{"text": c, "label": ["A", "B"]} for c in CHOICES], "answerKey": ["A", "C"]},
            r"row 2: 2 choices have the labels \['A', 'B'\] and the answer 'C'",
        ),
        (
            "arc-easy/train",
            TEXTS | {"choices": [{"text": c, "label": ["A"]} for c in CHOICES], "answerKey": ["A", "A"]},
            r"row 1: 2 choices have the labels \['A'\]",
        ),
        (
            "arc-easy/train",
            TEXTS | {"choices": [{"text": c} for c in CHOICES], "answerKey": ["A", "A"]},
            r"wanted records of text \(lists of texts\), label \(lists of texts\)",
        ),
        (
            "smoltalk/train",
            {"messages": [SAID[0], [{"role": "user", "content": None}]]},
            r"row 2: messages\[0\]\['content'\] is 'None'",
        ),
        ("smoltalk/train", {"messages": [SAID[0], []]}, "row 2: malformed conversation: wanted"),
        (
            "smoltalk/train",
            {"messages": ["user: a", "user: b"]},
            "'messages' is string, wanted lists of records of role",
        ),
        (
            "humaneval/test",
            {"prompt": ["def f(:\n"], "canonical_solution": ["    pass"], "test": ["x"], "entry_point": ["f"]},
            "row 1: prompt and canonical_solution are no Python",
        ),
    ],
)
def test_rows_that_do_not_fit_together_are_named_before_training_begins(base, source, table, message):
    path = Paths(base).chat_data / f"{source}.parquet"
    pq.write_table(pa.table(table), path)
    load = {
        "mmlu/auxiliary_train": lambda paths: MMLU(paths, "auxiliary_train"),
        "arc-easy/train": lambda paths: ARC(paths, "ARC-Easy", "train"),
        "smoltalk/train": SmolTalk,
        "humaneval/test": HumanEval,
    }[source]
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        load(Paths(base))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tree\nit's\n", r"line 2: \"it's\" is no word of letters"),
        (b"tree\n\n5\n", "line 3: '5' is no word of letters"),
        (b"tree\n\xff\n", "is no text in UTF-8"),
        (b"\n", "has no words for the train split"),
    ],
)
def test_a_bad_list_of_words_is_named(base, content, message):
    Paths(base).words.write_bytes(content)
    with pytest.raises(UserError, match=f"words.txt.*{message}"):
        SpellingBee(Paths(base), "train", 5)


def test_spelling_counts_what_it_asks(world):
    task = SpellingBee(world, "test", 40)
    for index in range(40):
        conversation = task[index]
        expression = conversation["messages"][1]["content"][1]["text"]
        word, letter = expression.split("'")[1], expression.split("'")[3]
        assert re.search(rf"\b{word}\b", conversation["messages"][0]["content"])
        assert task.judge(conversation, f"#### {word.count(letter)}")
        assert not task.judge(conversation, f"#### {word.count(letter) + 1}") and not task.judge(conversation, "")


def test_spelling_bee_spells_counts_place_by_place_and_checks(world):
    task = SpellingBee(world, "train", 300)
    for index in range(300):
        before, call, result, after = (part["text"] for part in task[index]["messages"][1]["content"])
        word, letter = call.split("'")[1], call.split("'")[3]
        assert calculate(call) == result and after == f"\n\n#### {result}"
        spelled, counted, _ = before.split("\n")
        assert spelled == f"{word}:{','.join(word)}"
        places = re.findall(r"([a-z])(\d+)", counted)
        assert "".join(place for place, _ in places) == word
        count = 0
        for place, so_far in places:
            count += place == letter
            assert int(so_far) == count
        assert places[-1][1] == result


@pytest.mark.parametrize(
    ("task", "wordings", "least"), [(SpellingBee, COUNT_QUESTIONS, 40), (SimpleSpelling, SPELL_QUESTIONS, 8)]
)
def test_spelling_is_asked_as_people_type_it(world, task, wordings, least):
    assert len(set(wordings)) == len(wordings) >= least
    rows = [task(world, "train", 2000)[index]["messages"] for index in range(2000)]
    asked = [re.sub(r"\W", "", row[0]["content"]).lower() for row in rows]
    for wording in wordings:  # letters and words stand where the wording has them
        pattern = re.sub(r"\W", "", re.sub(r"{\w+}", "PLACE", wording)).lower().replace("place", "[a-z]+")
        assert any(re.fullmatch(pattern, question) for question in asked), wording
    questions = [row[0]["content"] for row in rows]
    for variant in (r".*'\w+'.*", r'.*"\w+".*', "[^'\"]*", r".*[?]", r".*\w", "[A-ZÉ].*", "[^A-ZÉ]*"):
        assert 100 < sum(bool(re.fullmatch(variant, question)) for question in questions) < 1900, variant


def test_the_languages_of_spelling_bee():
    of_language = {"how": 5, "wie": 5, "combien": 5, "cuántas": 5, "quante": 5}
    for word, least in of_language.items():
        assert sum(word in wording.lower() for wording in COUNT_QUESTIONS) >= least, word


def test_solutions_of_the_generated_functions_pass(world):
    task = HumanEval(world)
    for index in range(0, len(task), 6):
        conversation = task[index]
        assert task.judge(conversation, conversation["messages"][-1]["content"])
        assert not task.judge(conversation, "```python\ndef wrong(x):\n    return None\n```")


ROW = {
    "prompt": 'from math import (\n    floor,\n)\n\ndef twice(x):\n    return 2 * x\n\ndef f(x):\n    """2·⌊x⌋"""\n',
    "canonical_solution": "    return twice(floor(x))\n",
    "test": "def check(candidate):\n    assert candidate(2.5) == twice(2)\n",
    "entry_point": "f",
}
CODE = "def f(x):\n    return twice(floor(x))\n"


@pytest.mark.parametrize(
    "completion",
    [
        CODE,
        f"```py\n{CODE}```",
        f"```Python\n{CODE}```",
        f"Here:\n\n```python3 title=x\n{CODE}```\nIt rounds.",
        f"```python\n{CODE}```".replace("\n", "\r\n"),
        f"```python\n{CODE}",
        f"```\n{CODE}```\n```python\nprint(f(2.5))\n```",
        f"```python\n{CODE.rstrip()}```",
        f"  ```python\n{textwrap.indent(CODE, '  ')}  ```",
        f"\n\n{textwrap.indent(CODE, '    ')}",
        f" {CODE}",
        f"```python\n{CODE}print('x' * 3_000_000)\n```",
        f"```python\n{CODE}if __name__ == '__main__':\n    raise SystemExit(f(1))\n```",
        "```python\ndef f(x):\n    '''Not the end: ``` or this.'''\n    return twice(floor(x))\n```",
    ],
)
def test_right_completions_pass(world, completion):
    assert HumanEval(world).judge({"row": ROW}, completion)


@pytest.mark.parametrize(
    "completion", ["", "import sys\nsys.exit(0)", "raise SystemExit", "import os\nos._exit(0)", "x = 1"]
)
def test_completions_that_only_end_do_not_pass(world, completion):
    assert not HumanEval(world).judge({"row": ROW}, completion)


def test_a_missing_chat_source_lists_those_there_are(base):
    shutil.rmtree(Paths(base).data / "chat" / "gsm8k")
    result = nanochat(base, "evaluate", "chat", "--tasks", "GSM8K", "--stage", "sft")
    assert_fails_with(result, "no checkpoint of sft", "nanochat train sft")
    with pytest.raises(
        UserError, match=r"gsm8k/train does not exist .* there are: arc-challenge/test.*nanochat data generate"
    ):
        GSM8K(Paths(base), "train")
