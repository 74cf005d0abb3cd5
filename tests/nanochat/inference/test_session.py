"""A chat session: what the model saw stays in the conversation token for token, and what is shown is made from it."""

import pytest

from nanochat.inference.session import Forgotten, Session, Text, ToolCall, ToolResult, events
from nanochat.platform.errors import UserError
from nanochat.tokenizer.chat_format import render, user_turn


class Scripted:
    """An engine that gives prepared answers and notes the prompts."""

    def __init__(self, tokenizer, answers, positions=10_000):
        self.tokenizer, self.answers, self.prompts, self.seeds = tokenizer, list(answers), [], []
        self.model = type("Model", (), {"cos": type("Table", (), {"size": lambda self, axis: positions})()})()

    def stream(self, prompts, max_tokens, **sampling):
        [prompt] = prompts
        self.prompts.append(prompt)
        self.seeds.append(sampling["seed"])
        for token in [*self.answers.pop(0), None]:
            yield [token], [True]


def tool_answer(tokenizer):
    def marked(kind, text):
        return [tokenizer.special(f"{kind}_start"), *tokenizer.encode(text), tokenizer.special(f"{kind}_end")]

    return [*tokenizer.encode("It is"), *marked("python", "2+3"), *marked("output", "5"), *tokenizer.encode(".")]


def test_the_history_keeps_the_tokens_of_tool_calls(tokenizer):
    answer = tool_answer(tokenizer)
    engine = Scripted(tokenizer, [answer, tokenizer.encode("Bye")])
    session = Session(engine, temperature=0.0)
    list(session.ask("What is 2+3?"))
    list(session.ask("Thanks"))
    parts = [("text", "It is"), ("python", "2+3"), ("python_output", "5"), ("text", ".")]
    said = [{"type": kind, "text": text} for kind, text in parts]
    talk = [("user", "What is 2+3?"), ("assistant", said), ("user", "Thanks")]
    expected, _ = render(tokenizer, {"messages": [{"role": role, "content": content} for role, content in talk]})
    assert engine.prompts[1] == [*expected, tokenizer.special("assistant_start")]


def test_tokens_that_text_would_not_give_back_are_kept(tokenizer):
    """A model may write a word in pieces that the tokenizer would merge."""
    pieces = [token for letter in "Where" for token in tokenizer.encode(letter)]
    assert pieces != tokenizer.encode("Where")
    engine = Scripted(tokenizer, [pieces, pieces])
    session = Session(engine)
    list(session.ask("a")), list(session.ask("b"))
    start = len([tokenizer.bos, *user_turn(tokenizer, "a")]) + 1
    assert engine.prompts[1][start : start + len(pieces)] == pieces


class Interrupted(Scripted):
    """An engine that is interrupted after two tokens of its first answer."""

    def stream(self, prompts, max_tokens, **sampling):
        for number, found in enumerate(super().stream(prompts, max_tokens, **sampling)):
            if number == 2 and len(self.prompts) == 1:
                raise KeyboardInterrupt
            yield found


@pytest.mark.parametrize("how", ["while it is generated", "while it is shown"])
def test_an_interrupted_answer_stays_in_the_conversation(tokenizer, how):
    said = [tokenizer.encode("a")[0], tokenizer.encode("b")[0], tokenizer.encode("c")[0]]
    engine = (Interrupted if how == "while it is generated" else Scripted)(tokenizer, [said, said])
    session = Session(engine)
    answer = session.ask("one")
    if how == "while it is generated":
        with pytest.raises(KeyboardInterrupt):
            list(answer)
    else:
        assert [next(answer).text, next(answer).text] == ["a", "b"]
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
    list(session.ask("two"))
    turn = [
        *user_turn(tokenizer, "one"),
        tokenizer.special("assistant_start"),
        *said[:2],
        tokenizer.special("assistant_end"),
    ]
    assert engine.prompts[1][1 : len(turn) + 1] == turn and len(session.turns) == 2


def test_each_answer_has_a_seed_of_its_own(tokenizer):
    engine = Scripted(tokenizer, [tokenizer.encode("x")] * 3)
    session = Session(engine, seed=7)
    for question in "abc":
        list(session.ask(question))
    assert engine.seeds == [7, 8, 9]


def test_special_tokens_at_the_wrong_place_are_not_shown(tokenizer):
    tokens = [tokenizer.bos, *tokenizer.encode("a"), tokenizer.special("user_start"), *tokenizer.encode("b")]
    assert "".join(event.text for event in events(tokenizer, iter(tokens))) == "ab"


def test_an_answer_as_events(tokenizer):
    found = list(events(tokenizer, iter(tool_answer(tokenizer))))
    assert "".join(e.text for e in found if isinstance(e, Text)) == "It is."
    assert [e for e in found if not isinstance(e, Text)] == [ToolCall("2+3"), ToolResult("5")]


def test_a_character_is_shown_whole(tokenizer):
    tokens = tokenizer.encode("é오")
    assert [e.text for e in events(tokenizer, iter(tokens))] == ["é", "오"] and len(tokens) > 2


def test_the_oldest_turns_are_forgotten_and_it_says_so(tokenizer):
    engine = Scripted(tokenizer, [tokenizer.encode("x" * 20)] * 9, positions=120)
    session = Session(engine, max_tokens=20)
    said = [event for _ in range(9) for event in session.ask("y" * 10)]
    forgotten = [event for event in said if isinstance(event, Forgotten)]
    assert forgotten and all(len(prompt) + 20 <= 120 for prompt in engine.prompts)
    assert len(session.turns) + sum(event.turns for event in forgotten) == 9


@pytest.mark.parametrize("missing", [0, 1])
def test_a_turn_is_kept_while_it_fits_exactly(tokenizer, missing):
    answer, most = tokenizer.encode("x" * 30), 8
    question = len(user_turn(tokenizer, "y" * 30)) + 1
    turn = question + len(answer) + 1
    positions = 1 + turn + question + most - missing
    assert most < positions // 4  # so that this is the room that is left for an answer
    engine = Scripted(tokenizer, [answer, answer], positions)
    session = Session(engine, max_tokens=most)
    list(session.ask("y" * 30)), list(session.ask("y" * 30))
    assert len(engine.prompts[1]) == 1 + question + (0 if missing else turn)


def test_a_message_that_is_too_long_or_stopped_leaves_the_conversation_as_it_was(tokenizer):
    engine = Scripted(tokenizer, [tokenizer.encode("some words")] * 9, positions=120)
    session = Session(engine, max_tokens=20)
    list(session.ask("hello"))
    before = list(session.turns)
    with pytest.raises(UserError, match="the model 120 positions; shorten it"):
        list(session.ask("z" * 400))
    next(iter(session.ask("w" * 60)))
    assert session.turns == before
