"""GSM8K: word problems whose answers call the calculator; an answer is right if the number after #### is."""

import re

from nanochat.platform.paths import Paths
from nanochat.tasks.rows import RowTask, load_rows

_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_ANSWER = re.compile(r"#### (-?\.?[0-9][0-9.,]*)")


def final_number(text: str) -> str | None:
    """The number after the first "#### " that has one, without commas and a full stop at its end; None when there is no such number."""
    match = _ANSWER.search(text)
    return match.group(1).replace(",", "").rstrip(".") if match else None


def solution_parts(answer: str) -> list[dict[str, str]]:
    """Split a worked answer at its <<expression=result>> marks into text and calculator calls."""
    parts, end = [], 0
    for call in _CALL.finditer(answer):
        parts.append({"type": "text", "text": answer[end : call.start()]})
        parts.append({"type": "python", "text": call.group(1)})
        parts.append({"type": "python_output", "text": call.group(2)})
        end = call.end()
    parts.append({"type": "text", "text": answer[end:]})
    return [part for part in parts if part["text"]]


class GSM8K(RowTask):
    """openai/gsm8k, main: question, answer."""

    name, kind, baseline = "GSM8K", "generative", 0.0

    def __init__(self, paths: Paths, split: str):
        self._rows = load_rows(paths, "gsm8k", split, {"question": str, "answer": str})

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        answer = {"role": "assistant", "content": solution_parts(row["answer"])}
        return {"messages": [{"role": "user", "content": row["question"]}, answer]}

    def judge(self, conversation: dict, completion: str) -> bool:
        wanted = final_number("".join(part["text"] for part in conversation["messages"][-1]["content"]))
        return wanted is not None and final_number(completion) == wanted
