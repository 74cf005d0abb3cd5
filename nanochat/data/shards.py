"""Reads the parquet shards of pretraining text by row groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.columns import check_type
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths


@dataclass(frozen=True)
class Shards:
    """The row groups of a split, numbered across its shards."""

    files: tuple[Path, ...]
    row_groups: tuple[tuple[int, int], ...]  # (file, row group in it)

    @classmethod
    def of(cls, paths: Paths, split: str) -> "Shards":
        """The shards of a split: "val" is the last shard, "train" all others. Opens every file, to find a bad one at once.

        Raises UserError for fewer than two shards, a gap in their numbers, and a shard that is truncated, is not parquet, or
        has no column `text` or no rows.
        """
        files = sorted(paths.text.glob("*.parquet"))
        if len(files) < 2:
            raise UserError(
                f"{paths.text} has {len(files)} parquet shards, wanted two or more (the last is for validation); "
                f"{paths.get_data}"
            )
        missing = _first_gap(files[:-1])  # the validation shard is the last of the whole set, far from the others
        if missing:
            raise UserError(f"shard {paths.text / missing} is missing though later ones are there; fetch it again")
        chosen = tuple(files[:-1] if split == "train" else files[-1:])
        row_groups = [(i, group) for i, path in enumerate(chosen) for group in range(_open(path).num_row_groups)]
        return cls(chosen, tuple(row_groups))

    def read(self, index: int) -> list[str]:
        """The documents of row group number `index` that have text; none if all of them are null or empty."""
        file, row_group = self.row_groups[index]
        path = self.files[file]
        try:
            column = _open(path).read_row_group(row_group, columns=["text"]).column("text")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        try:
            return [text for text in column.to_pylist() if text]
        except UnicodeDecodeError as error:
            metadata = _open(path).metadata
            row = 1 + sum(metadata.row_group(number).num_rows for number in range(row_group))
            raise UserError(
                f"{path} has a text that is no UTF-8, at row {row + _first_undecodable(column)} ({error}); remove the file and fetch "
                "or generate it again"
            ) from error

    def documents(self) -> Iterator[str]:
        """All documents with text, in order. Raises UserError when there is none."""
        everything, found = range(len(self.row_groups)), False
        for index in everything:
            for text in self.read(index):
                found = True
                yield text
        if not found:
            raise self.without_text(everything)

    def without_text(self, row_groups: Sequence[int]) -> UserError:
        """The error that none of the documents of these row groups has text."""
        files = [str(self.files[file]) for file in sorted({self.row_groups[index][0] for index in row_groups})]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return UserError(
            f"{files[0]}{more}: all texts of {len(row_groups)} row groups are null or empty, wanted documents; remove these "
            "files and fetch or generate them again"
        )


def _first_gap(files: list[Path]) -> str | None:
    numbers = [int(path.stem.rpartition("_")[2]) for path in files if path.stem.rpartition("_")[2].isdigit()]
    for expected, number in enumerate(numbers):
        if number != expected:
            return f"shard_{expected:05d}.parquet"
    return None


@lru_cache(maxsize=8)  # consecutive row groups are in the same file, whose footer need not be read again
def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    if "text" not in file.schema_arrow.names:
        raise UserError(
            f"{path} has no column 'text' (it has {', '.join(file.schema_arrow.names)}); fetch or generate it again"
        )
    check_type(file.schema_arrow.field("text"), str, path)
    if file.metadata.num_rows == 0:
        raise UserError(f"{path} has no rows; fetch or generate it again")
    return file


def _first_undecodable(column: pa.ChunkedArray) -> int:
    """The index of the first text that is no UTF-8."""
    for index, text in enumerate(column):
        try:
            text.as_py()
        except UnicodeDecodeError:
            return index
    return 0


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{path} is truncated or no parquet file ({reason}); remove it and fetch or generate it again")
