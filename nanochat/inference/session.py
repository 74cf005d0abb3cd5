"""A chat session: keeps the conversation as token ids, and gives answers as events.

Answers, calculator calls and their results stay in the conversation exactly as the model saw them. Text is made from ids for
display only and never turned back into ids, because the tokenizer may split the same text into other tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nanochat.inference.engine import Engine
from nanochat.platform.errors import UserError
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.tokenizer.chat_format import user_turn


@dataclass(frozen=True)
class Text:
    """A piece of the answer; it consists of whole characters."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """An expression that the model has handed to the calculator."""

    text: str


@dataclass(frozen=True)
class ToolResult:
    """What the calculator answered."""

    text: str


@dataclass(frozen=True)
class Forgotten:
    """The conversation no longer fitted into the positions of the model, so that its oldest turns were dropped."""

    turns: int


Event = Text | ToolCall | ToolResult | Forgotten


class Session:
    """A conversation with a model. sampling: temperature and top_k as in Engine.stream; max_tokens: of an answer.

    seed: of the first answer; each answer after it is sampled with the next seed, so that the same question may get another answer.
    """

    def __init__(self, engine: Engine, max_tokens: int = 512, seed: int = 42, **sampling) -> None:
        self.engine, self.max_tokens, self.seed, self.sampling = engine, max_tokens, seed, sampling
        self.turns: list[list[int]] = []  # each has the ids of a question and its answer

    def clear(self) -> None:
        """Start a new conversation."""
        self.turns = []

    def ask(self, text: str) -> Iterator[Event]:
        """Answer a message; the events come while the answer is generated.

        The message and its answer join the conversation when the answer has been read to its end, and what there is of it when the
        user interrupts it; an answer that nobody reads to its end leaves the conversation as it was. Raises UserError when the
        message alone does not fit into the model's positions.
        """
        tokenizer = self.engine.tokenizer
        question = [*user_turn(tokenizer, text), tokenizer.special("assistant_start")]
        kept = self._newest_turns(len(question))
        if len(kept) < len(self.turns):
            yield Forgotten(len(self.turns) - len(kept))
        prompt = [tokenizer.bos, *(token for turn in kept for token in turn), *question]
        answer: list[int] = []

        def tokens() -> Iterator[int]:
            for [token], _ in self.engine.stream([prompt], self.max_tokens, seed=self.seed, **self.sampling):
                if token is not None:
                    answer.append(token)
                    yield token

        try:
            yield from events(tokenizer, tokens())
        except KeyboardInterrupt:
            self._join(kept, question, answer)
            raise
        self._join(kept, question, answer)

    def _join(self, kept: list[list[int]], question: list[int], answer: list[int]) -> None:
        self.turns = [*kept, [*question, *answer, self.engine.tokenizer.special("assistant_end")]]
        self.seed += 1

    def _newest_turns(self, question: int) -> list[list[int]]:
        """The newest turns that fit before a question of `question` tokens and its answer.

        An answer gets max_tokens, but no more than a quarter of the positions. Raises UserError when the question does not fit.
        """
        positions = self.engine.model.cos.size(0)
        if 1 + question >= positions:
            raise UserError(f"the message has {question} tokens and the model {positions} positions; shorten it")
        kept, available = list(self.turns), positions - 1 - question - min(self.max_tokens, positions // 4)
        while kept and sum(map(len, kept)) > available:
            kept.pop(0)
        return kept


class Reader:
    """Turns generated tokens into events: text in pieces of whole characters, each tool call and each result in one piece.

    Other special tokens, which a model may write at the wrong place, are not text and are left out.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.kinds = {tokenizer.special("python_start"): ToolCall, tokenizer.special("output_start"): ToolResult}
        self.ends = {tokenizer.special("python_end"), tokenizer.special("output_end")}
        self.kind: type[Event] = Text
        self.waiting: list[int] = []  # tokens that are not in an event yet

    def add(self, token: int) -> Iterator[Event]:
        """The events that this token completes, of which there are none or one."""
        decode = self.tokenizer.decode
        if token in self.kinds or token in self.ends:
            if self.waiting or self.kind is not Text:
                yield self.kind(decode(self.waiting))
            self.kind, self.waiting = self.kinds.get(token, Text), []
        elif token < len(self.tokenizer.ranks):
            self.waiting.append(token)
            # a character has at most four bytes, so that an incomplete one of more than eight tokens is not UTF-8
            if self.kind is Text and (not decode(self.waiting).endswith("\ufffd") or len(self.waiting) > 8):
                yield from self.end()

    def end(self) -> Iterator[Event]:
        """What is left when no more tokens come."""
        if self.waiting:
            yield self.kind(self.tokenizer.decode(self.waiting))
        self.waiting = []


def events(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[Event]:
    """Generated tokens as events, by a Reader."""
    reader = Reader(tokenizer)
    for token in tokens:
        yield from reader.add(token)
    yield from reader.end()


class Shown:
    """Makes the text to print of events; a calculator call and its result become [expression → result]."""

    def __init__(self) -> None:
        self.call: str | None = None  # an expression that is not shown yet, because its result may follow

    def add(self, event: Event) -> Iterator[str]:
        """The text of an event."""
        if isinstance(event, ToolResult):
            yield f" [{self.call} → {event.text}] " if self.call is not None else f" [→ {event.text}] "
            self.call = None
            return
        yield from self.end()
        if isinstance(event, ToolCall):
            self.call = event.text
        elif isinstance(event, Forgotten):
            yield f"(the {event.turns} oldest turns of this conversation no longer fit and are forgotten)\n"
        else:
            yield event.text

    def end(self) -> Iterator[str]:
        """What is left when no more events come."""
        if self.call is not None:
            yield f" [{self.call}] "
        self.call = None


def shown(events: Iterable[Event]) -> Iterator[str]:
    """The text to print for each event, by Shown."""
    text = Shown()
    for event in events:
        yield from text.add(event)
    yield from text.end()
