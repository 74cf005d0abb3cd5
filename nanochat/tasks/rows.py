"""Loads the rows of a chat source: parquet or JSONL files chat/<source>/<split>, whole or in numbered parts."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.columns import check_values
from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_json_lines
from nanochat.platform.paths import Paths
from nanochat.tokenizer.chat_format import check_conversation

SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Rows:
    """The rows of a split in a shuffled order, the same in every run, so that a share of them is a sample of all."""

    files: list[Path]
    tables: list[pa.Table | list[dict]]
    """the rows of each file"""

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(len(table) for table in self.tables))

    @cached_property
    def order(self) -> np.ndarray:
        return np.random.default_rng(SHUFFLE_SEED).permutation(len(self))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        file, row = self.find(index)
        table = self.tables[file]
        return table[row] if isinstance(table, list) else table.slice(row, 1).to_pylist()[0]

    def find(self, index: int) -> tuple[int, int]:
        """The number of an item's file, and of its row in it."""
        number = int(self.order[index])
        file = bisect_right(self.ends, number)
        return file, number - (self.ends[file - 1] if file else 0)


class RowTask:
    """A task whose items are made from rows."""

    _rows: Rows

    @property
    def files(self) -> list[Path]:
        return self._rows.files

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        """The file of an item and its row in it, from 1 on, for a message."""
        file, row = self._rows.find(index)
        return f"{self.files[file]}, row {row + 1}"


def load_rows(
    paths: Paths, source: str, split: str, shape: dict[str, object], check: Callable[[dict], None] | None = None
) -> Rows:
    """The rows of a split, all of them checked: every mistake is found before training begins.

    shape: the columns, and what each holds (see check_type). check: raises UserError for a row whose values do not fit together.
    Raises UserError for a missing source, split or column, a bad value, with its file and row, and a damaged file.
    """
    directory = paths.chat_data / source
    files = _files_of(directory, split)
    if not files:
        existing = [f"{p.parent.name}/{p.stem}" for p in sorted(paths.chat_data.glob("*/*")) if p.is_file()]
        raise UserError(
            f"the chat source {source}/{split} does not exist under {paths.chat_data}; "
            f"there are: {', '.join(existing) or 'none'}; {paths.get_data}"
        )
    lines = [path for path in files if path.suffix == ".jsonl"]
    if lines and "messages" not in shape:
        raise UserError(
            f"{lines[0]} would be read as conversations, and {source} needs a parquet table with {', '.join(shape)}; convert it, or "
            "move it away"
        )
    rows = Rows(
        files, [_read_lines(path) if path.suffix == ".jsonl" else _read_table(path, shape, check) for path in files]
    )
    if len(rows) == 0:
        raise UserError(f"{files[0]} has no rows; {paths.get_data}")
    return rows


def conversations_in(path: Path) -> Rows:
    """The rows of one file of conversations, as JSON lines (see _read_lines)."""
    if not (lines := _read_lines(path)):
        raise UserError(f"{path} has no conversations; write one on each line, as a JSON array of messages")
    return Rows([path], [lines])


def _files_of(directory: Path, split: str) -> list[Path]:
    """The files of a split: <split>, or parts such as <split>-00000-of-00002; says which others look like it and are not read."""
    alike = sorted([*directory.glob(f"{split}*.parquet"), *directory.glob(f"{split}*.jsonl")])
    files = [path for path in alike if re.fullmatch(rf"{split}(-\d+(-of-\d+)?)?", path.stem)]
    for path in alike:
        if path not in files:
            say(
                f"not read: {path}; files of {split} are named {split}{path.suffix} or {split}-00000-of-00001{path.suffix}"
            )
    return files


def _read_table(path: Path, shape: dict[str, object], check: Callable[[dict], None] | None) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); remove it and fetch or generate it again") from error
    for name, part in shape.items():
        if name not in table.column_names:
            raise UserError(
                f"{path} has no column {name!r} (it has {', '.join(table.column_names)}); fetch or generate it again"
            )
        check_values(table, name, part, path)
    rows = (row for batch in table.select(list(shape)).to_batches() for row in batch.to_pylist()) if check else ()
    for number, row in enumerate(rows, 1):
        with at_place(f"{path}, row {number}"):
            check(row)
    return table


def _read_lines(path: Path) -> list[dict]:
    """Conversations, each line an array of messages or an object with one under "messages"."""
    rows = []
    for number, value in read_json_lines(path):
        row = value if isinstance(value, dict) else {"messages": value}
        with at_place(f"{path}, line {number}"):
            if all(message["role"] == "user" for message in check_conversation(row)):
                raise UserError(
                    "no message is from the assistant, so that it teaches nothing; add an answer or remove it"
                )
        rows.append(row)
    return rows


@contextmanager
def at_place(place: str) -> Iterator[None]:
    """Put the place of a mistake in front of the block's UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
