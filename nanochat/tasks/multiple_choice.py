"""Multiple choice: questions as conversations whose answer is one letter."""

from nanochat.tasks.rows import RowTask

LETTERS = "ABCDEFGHIJ"


def multiple_choice(question: str, choices: list[str], letters: list[str], answer: str) -> dict:
    """A conversation that asks for the letter of the right choice.

    Each letter stands behind its choice, so that a model that recalls the choice sees the letter next.
    """
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    prompt = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "letters": letters}


class Categorical(RowTask):
    """A multiple-choice task over a table of rows; a completion is right if it is the letter of the answer."""

    kind, baseline = "categorical", 0.25

    def judge(self, conversation: dict, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]
