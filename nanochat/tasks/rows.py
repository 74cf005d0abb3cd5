"""Loads the rows of a chat source: parquet or JSONL files chat/<source>/<split>*."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
        file, row = self._find(index)
        table = self.tables[file]
        return table[row] if isinstance(table, list) else table.slice(row, 1).to_pylist()[0]

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        file, row = self._find(index)
        return f"{self.files[file]}, row {row + 1}"

    def _find(self, index: int) -> tuple[int, int]:
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


def load_rows(paths: Paths, source: str, split: str, columns: tuple[str, ...]) -> Rows:
    """The rows of a split. Raises UserError for a missing source, split, column or value, with its file and row, and a damaged file."""
    directory = paths.chat_data / source
    files = sorted([*directory.glob(f"{split}*.parquet"), *directory.glob(f"{split}*.jsonl")])
    if not files:
        existing = [f"{p.parent.name}/{p.stem}" for p in sorted(paths.chat_data.glob("*/*")) if p.is_file()]
        raise UserError(
            f"the chat source {source}/{split} does not exist under {paths.chat_data}; "
            f"there are: {', '.join(existing) or 'none'}; {paths.get_data}"
        )
    rows = Rows(files, [_read_lines(path) if path.suffix == ".jsonl" else _read_table(path, columns) for path in files])
    if len(rows) == 0:
        raise UserError(f"{files[0]} has no rows; {paths.get_data}")
    return rows


def _read_table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); remove it and fetch or generate it again") from error
    for name in columns:
        if name not in table.column_names:
            raise UserError(
                f"{path} has no column {name!r} (it has {', '.join(table.column_names)}); fetch or generate it again"
            )
        column = table.column(name)
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            raise UserError(f"{path}: the column {name!r} is {column.type}, wanted texts; fetch or generate it again")
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{path}, row {row + 1} has no {name}; fill or remove the row")
    return table


def _read_lines(path: Path) -> list[dict]:
    """Conversations, each line an array of messages or an object with one under "messages"."""
    rows = []
    for number, value in read_json_lines(path):
        row = value if isinstance(value, dict) else {"messages": value}
        checked(row, f"{path}, line {number}")
        rows.append(row)
    return rows


def checked(conversation: dict, place: str) -> dict:
    """A conversation, after a check. Raises UserError with the place where a malformed one stands."""
    try:
        check_conversation(conversation)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return conversation
