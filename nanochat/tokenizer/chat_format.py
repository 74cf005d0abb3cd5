"""The format of conversations: how messages become tokens, and which tokens the assistant has to produce.

A conversation is {"messages": [{"role", "content"}, …]}: an optional system message, then user and assistant in turn.
The assistant's content is text, or a list of parts {"type": "text" | "python" | "python_output", "text"}. A python part calls
the calculator, and a python_output part is the calculator's result.
"""

from nanochat.platform.errors import UserError
from nanochat.tokenizer.bpe import Tokenizer

PART_TYPES = {"text": None, "python": ("python_start", "python_end"), "python_output": ("output_start", "output_end")}


def render(tokenizer: Tokenizer, conversation: dict, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
    """The ids and the mask of a conversation, cut to max_tokens. Mask 1 marks the tokens that the assistant has to produce."""
    ids, mask = [tokenizer.bos], [0]

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    for message in check_conversation(conversation):
        if message["role"] == "user":
            add(user_turn(tokenizer, message["content"]), 0)
            continue
        add([tokenizer.special("assistant_start")], 0)
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            tokens, frame = tokenizer.encode(part["text"]), PART_TYPES[part["type"]]
            if frame:
                tokens = [tokenizer.special(frame[0]), *tokens, tokenizer.special(frame[1])]
            add(tokens, 0 if part["type"] == "python_output" else 1)
        add([tokenizer.special("assistant_end")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tokenizer: Tokenizer, conversation: dict) -> list[int]:
    """The ids up to the beginning of the assistant's last answer; an assistant message at the end is dropped."""
    messages = conversation["messages"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render(tokenizer, {"messages": messages})
    return [*ids, tokenizer.special("assistant_start")]


def user_turn(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a user's message, with user_start and user_end around it."""
    return [tokenizer.special("user_start"), *tokenizer.encode(text), tokenizer.special("user_end")]


def check_conversation(conversation: dict) -> list[dict]:
    """The messages of a conversation, with a system message merged into the first user message.

    Raises UserError when the conversation is malformed.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(
            "malformed conversation: wanted {'messages': [{'role', 'content'}, …]} with one message or more"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"malformed conversation: message {index} needs the keys role and content, got {message!r}")
    system = messages[0]["role"] == "system"
    if system and (len(messages) < 2 or messages[1]["role"] != "user"):
        raise UserError("malformed conversation: a system message must be followed by a user message")
    for index, message in enumerate(messages[system:], int(system)):
        role, expected = message["role"], "user" if index % 2 == system else "assistant"
        if role != expected:
            raise UserError(f"malformed conversation: message {index} is from {role!r}, wanted {expected!r} in turn")
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            continue
        if role != "assistant" or not isinstance(content, list):
            raise UserError(
                f"malformed conversation: message {index} ({role}) must be text, got {type(content).__name__}"
            )
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") not in PART_TYPES
                or not isinstance(part.get("text"), str)
            ):
                raise UserError(
                    f"malformed conversation: message {index} has a part that is not "
                    f"{{'type': {' | '.join(PART_TYPES)}, 'text'}}: {part!r}"
                )
    if system:
        merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return [merged, *messages[2:]]
    return messages
