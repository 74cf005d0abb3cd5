"""Loads the rows of a chat source: parquet or JSONL files chat/<source>/<split>*."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.platform.errors import GET_DATA, UserError
from nanochat.platform.paths import Paths


def load_rows(paths: Paths, source: str, split: str, columns: tuple[str, ...]) -> tuple[pa.Table, list[Path]]:
    """The rows of a split, and their files. Raises UserError for a missing source, split or column, and for a damaged file."""
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
    return table, files


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
