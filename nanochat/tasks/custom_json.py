"""Conversations from any file, for training."""

from pathlib import Path

from nanochat.tasks.rows import RowTask, conversations_in


class CustomJSON(RowTask):
    """A file of JSON lines: on each line an array of messages, from user and assistant in turn, or an object with one under "messages".

    Raises UserError for a file that cannot be read or has no conversations, and for a line that is malformed or has no message of the
    assistant, with its number.
    """

    def __init__(self, path: str | Path):
        self.name = Path(path).name
        self._rows = conversations_in(Path(path))

    def __getitem__(self, index: int) -> dict:
        return {"messages": self._rows[index]["messages"]}
