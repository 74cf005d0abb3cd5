"""HumanEval: complete a function; an answer is right if the function's tests pass in the sandbox."""

import ast
import re
import textwrap

from nanochat.inference.sandbox import confinement, run_tests
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tasks.rows import RowTask, load_rows

# a block ends with a fence that begins or ends its line, or with the text
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def extract_code(completion: str) -> str:
    """The first fenced code block of a completion, or the whole text without one; without a common indentation."""
    text = completion.replace("\r\n", "\n")
    match = _FENCE.search(text)
    return textwrap.dedent(match.group(1) if match else text).lstrip()


def helpers(row: dict[str, str]) -> str:
    """The code of a row's prompt without the function to complete: its imports, and the functions that it gives.

    Raises UserError for a prompt and solution that are no Python.
    """
    try:
        tree = ast.parse(row["prompt"] + row["canonical_solution"])
    except (SyntaxError, ValueError) as error:
        raise UserError(f"prompt and canonical_solution are no Python ({error})") from error
    tree.body = [node for node in tree.body if getattr(node, "name", None) != row["entry_point"]]
    return ast.unparse(tree)


class HumanEval(RowTask):
    """openai/openai_humaneval: prompt, canonical_solution, test, entry_point."""

    name, kind, baseline = "HumanEval", "generative", 0.0

    def __init__(self, paths: Paths, split: str = "test"):
        shape = dict.fromkeys(("prompt", "canonical_solution", "test", "entry_point"), str)
        self._rows = load_rows(paths, "humaneval", split, shape, helpers)

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        return {"messages": code_messages(row), "row": row}

    def conditions(self) -> dict[str, str]:
        return {"HumanEval is confined by": confinement()}

    def judge(self, conversation: dict, completion: str) -> bool:
        row = conversation["row"]
        return run_tests(extract_code(completion), row["test"], row["entry_point"], helpers(row)).passed


def code_messages(row: dict[str, str]) -> list[dict[str, str]]:
    """The messages of a row: the prompt, and the whole function in a fenced code block."""
    answer = f"```python\n{row['prompt']}{row['canonical_solution']}```"
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
