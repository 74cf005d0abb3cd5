"""HumanEval: complete a function; an answer is right if the function's tests pass in the sandbox."""

import re

from nanochat.inference.sandbox import run_python
from nanochat.platform.paths import Paths
from nanochat.tasks.rows import RowTask, load_rows

_FENCE = re.compile(r"```(?:python)?[ \t]*\n(.*?)```", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


def extract_code(completion: str) -> str:
    """The first fenced code block of a completion, or the whole text without one."""
    match = _FENCE.search(completion)
    return match.group(1) if match else completion


class HumanEval(RowTask):
    """openai/openai_humaneval: prompt, canonical_solution, test, entry_point."""

    name, kind, baseline = "HumanEval", "generative", 0.0

    def __init__(self, paths: Paths, split: str = "test"):
        columns = ("prompt", "canonical_solution", "test", "entry_point")
        self._rows = load_rows(paths, "humaneval", split, columns)

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        return {"messages": code_messages(row), "row": row}

    def judge(self, conversation: dict, completion: str) -> bool:
        row = conversation["row"]
        # the prompt's imports come first: a completion often repeats the function without them
        imports = "\n".join(_IMPORT.findall(row["prompt"]))
        program = f"{imports}\n\n{extract_code(completion)}\n\n{row['test']}\ncheck({row['entry_point']})\n"
        return run_python(program).ok


def code_messages(row: dict[str, str]) -> list[dict[str, str]]:
    """The messages of a row: the prompt, and the whole function in a fenced code block."""
    answer = f"```python\n{row['prompt']}{row['canonical_solution']}```"
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
