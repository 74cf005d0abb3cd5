"""Loads the rows of a chat source: parquet or JSONL files chat/<source>/<split>*."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.platform.errors import GET_DATA, UserError
from nanochat.platform.paths import Paths

SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Rows:
    """The rows of a split in a shuffled order, the same in every run, so that a share of them is a sample of all."""

    table: pa.Table
    files: list[Path]

    @cached_property
    def order(self) -> np.ndarray:
        return np.random.default_rng(SHUFFLE_SEED).permutation(self.table.num_rows)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self.table.slice(int(self.order[index]), 1).to_pylist()[0]


class RowTask:
    """A task whose items are made from rows."""

    _rows: Rows

    @property
    def files(self) -> list[Path]:
        return self._rows.files

    def __len__(self) -> int:
        return len(self._rows)


def load_rows(paths: Paths, source: str, split: str, columns: tuple[str, ...]) -> Rows:
    """The rows of a split. Raises UserError for a missing source, split or column, and for a damaged file."""
    directory = paths.chat_data / source
    files = sorted([*directory.glob(f"{split}*.parquet"), *directory.glob(f"{split}*.jsonl")])
    if not files:
        existing = [f"{p.parent.name}/{p.stem}" for p in sorted(paths.chat_data.glob("*/*")) if p.is_file()]
        raise UserError(
            f"the chat source {source}/{split} does not exist under {paths.chat_data}; "
            f"there are: {', '.join(existing) or 'none'}; {GET_DATA}"
        )
    table = pa.concat_tables([_read(path) for path in files], promote_options="default")
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(f"{files[0]} has no column {missing[0]!r} (it has {', '.join(table.column_names)}); {GET_DATA}")
    if table.num_rows == 0:
        raise UserError(f"{files[0]} has no rows; {GET_DATA}")
    return Rows(table, files)


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        lines = path.read_text("utf-8").splitlines()
        # each line is an array of messages, as in the identity conversations
        return pa.table({"messages": [json.loads(line) for line in lines if line.strip()]})
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); remove it and fetch or generate it again") from error
