"""Checks that a column of a parquet file has the type and the values that a reader relies on."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from nanochat.platform.errors import UserError
from nanochat.platform.shapes import check_shape

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TEXTS = (pa.types.is_string, pa.types.is_large_string)
_WORDS = {str: "texts", int: "integers"}


def check_type(column: pa.Field, shape: object, path: Path) -> None:
    """Raise UserError unless the column's type has a shape: str, int, [shape], or {"field": shape, …}."""
    if not _has_type(column.type, shape):
        raise UserError(
            f"{path}: the column {column.name!r} is {column.type}, wanted {_in_words(shape)}; fetch or generate it again"
        )


def check_values(table: pa.Table, name: str, shape: object, path: Path) -> None:
    """As check_type, for a column that must not have nulls either; UserError names the first row with one."""
    check_type(table.schema.field(name), shape, path)
    column = table.column(name)
    if not _has_nulls(column, shape) and _is_valid(column):
        return
    for row, scalar in enumerate(column, 1):
        try:
            value = scalar.as_py()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, row {row}: {name} is no text in UTF-8 ({error}); correct or remove the row"
            ) from error
        if value is None:
            raise UserError(f"{path}, row {row} has no {name}; fill or remove the row")
        check_shape(value, shape, f"{path}, row {row}: {name}")


def _has_type(found: pa.DataType, shape: object) -> bool:
    if isinstance(shape, list):
        return any(is_list(found) for is_list in _LISTS) and _has_type(found.value_type, shape[0])
    if isinstance(shape, dict):
        names = (
            {found.field(i).name: found.field(i).type for i in range(found.num_fields)}
            if pa.types.is_struct(found)
            else {}
        )
        return all(name in names and _has_type(names[name], part) for name, part in shape.items())
    return pa.types.is_integer(found) if shape is int else any(is_text(found) for is_text in _TEXTS)


def _has_nulls(column: pa.ChunkedArray, shape: object) -> bool:
    if column.null_count:
        return True
    if isinstance(shape, list):
        return _has_nulls(pc.list_flatten(column), shape[0])
    parts = shape.items() if isinstance(shape, dict) else ()
    return any(_has_nulls(pc.struct_field(column, name), part) for name, part in parts)


def _is_valid(column: pa.ChunkedArray) -> bool:
    """Whether all texts are UTF-8, which reading a file does not check."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _in_words(shape: object) -> str:
    if isinstance(shape, list):
        return f"lists of {_in_words(shape[0])}"
    if isinstance(shape, dict):
        return f"records of {', '.join(f'{name} ({_in_words(part)})' for name, part in shape.items())}"
    return _WORDS[shape]
