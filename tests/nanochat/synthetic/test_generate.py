"""The embedded data: repeatable, and free of what the tests ask."""

import random
import re
from dataclasses import replace

import pytest

from nanochat.data.shards import Shards
from nanochat.platform.errors import UserError
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths
from nanochat.synthetic import world as closed_world
from nanochat.synthetic.generate import _letters, generate
from nanochat.tasks import ARC, GSM8K, MMLU, HumanEval, SimpleSpelling, SmolTalk, SpellingBee
from tests.conftest import TINY_DATA


def test_generating_twice_gives_the_same_files(world, tmp_path):
    generate(TINY_DATA, Paths(tmp_path))
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (world.base / path.relative_to(tmp_path)).read_bytes(), path


def test_no_document_is_empty():
    """Also where all words that were drawn are of the test split."""
    words = closed_world.words(1, 400)
    tested = [word for word in words if closed_world.in_test("word", word)]
    few = [*tested[:20], *(word for word in words if word not in tested)][:22]
    assert all(_letters(random.Random(seed), {}, few) for seed in range(100))


def test_nothing_tested_stands_in_training_data(world):
    prompts = lambda task: {task[i]["messages"][0]["content"] for i in range(len(task))}  # noqa: E731
    questions = lambda task: {p.split("\n")[0] for p in prompts(task)}  # noqa: E731
    trained = questions(MMLU(world, "auxiliary_train")) | questions(ARC(world, "ARC-Easy", "train"))
    trained |= questions(ARC(world, "ARC-Challenge", "train"))
    tested = questions(ARC(world, "ARC-Easy", "test")) | questions(ARC(world, "ARC-Challenge", "test"))
    tested |= questions(MMLU(world, "test"))
    assert tested and not trained & tested
    assert not prompts(GSM8K(world, "train")) & prompts(GSM8K(world, "test"))
    text = "\n".join(Shards.of(world, "train").documents())
    talk = SmolTalk(world)
    said = "\n".join(m["content"] for i in range(len(talk)) for m in talk[i]["messages"])
    asked = {q.removeprefix("Multiple Choice question: ") for q in tested}
    assert not [q for q in asked if q in text or q in said]
    tests = HumanEval(world)
    assert not [tests[i]["row"]["prompt"] for i in range(len(tests)) if tests[i]["row"]["prompt"] in said]
    spelled = [w for w in world.words.read_text().split() if closed_world.in_test("word", w)]
    letters = set(
        re.findall(r"\w+(?=:)|(?<=')\w+(?=')", text)
    )  # what has its letters in the text, or one of them counted
    assert len(spelled) > 20 and len(letters) > 100 and not letters & set(spelled)
    for task in (SimpleSpelling(world, "train", 300), SpellingBee(world, "train", 300)):
        answers = [task[i]["messages"][1]["content"] for i in range(300)]
        words = {(answer if isinstance(answer, str) else answer[0]["text"]).partition(":")[0] for answer in answers}
        assert len(words) > 100 and not words & set(spelled)


def test_every_embedded_question_has_four_choices_with_labels_of_their_own(world):
    for task in (ARC(world, "ARC-Easy", "train"), ARC(world, "ARC-Challenge", "test"), MMLU(world, "auxiliary_train")):
        for index in range(len(task)):
            conversation = task[index]
            assert len(set(conversation["letters"])) == 4
            assert conversation["messages"][1]["content"] in conversation["letters"]


def test_challenge_facts_are_told_but_never_asked(world):
    facts = [fact for fact in closed_world.facts(TINY_DATA.seed) if fact.challenge]
    assert len(facts) > 30
    text = "\n".join(Shards.of(world, "train").documents())
    for fact in facts:
        assert not fact.questions("train") and fact.questions("challenge")
        assert any(sentence in text for sentence in fact.sentences())


def test_data_that_are_in_use_do_not_change(tmp_path):
    """Neither under checkpoints nor under a training that reads them; the same data may be written again."""
    paths = Paths(tmp_path)
    generate(TINY_DATA, paths)
    before = {path: path.read_bytes() for path in paths.embedded.rglob("*") if path.is_file()}
    other = replace(TINY_DATA, seed=TINY_DATA.seed + 1)
    with (
        locked(paths.lock("sft"), "train sft"),
        pytest.raises(UserError, match=r"sft reads them now \(process .*--run-name NAME"),
    ):
        generate(other, paths)
    (paths.checkpoints("base") / "step_000003").mkdir(parents=True)
    (paths.checkpoints("base") / "step_000003" / "meta.json").touch()
    with pytest.raises(UserError, match="would change, but checkpoints depend on them: base; give the new data a run"):
        generate(other, paths)
    edited = paths.embedded / "chat" / "identity" / "conversations.jsonl"
    edited.write_text("[]\n")
    with pytest.raises(UserError, match="checkpoints depend on them: base"):
        generate(replace(TINY_DATA, changed="replace"), paths)
    edited.write_bytes(before[edited])
    generate(TINY_DATA, paths)
    assert before == {path: path.read_bytes() for path in paths.embedded.rglob("*") if path.is_file()}
