"""SmolTalk: general conversations, for training."""

from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from nanochat.platform.paths import Paths
from nanochat.tasks.rows import RowTask, at_place, load_rows
from nanochat.tokenizer.chat_format import check_conversation

SHAPE = {"messages": [{"role": str, "content": str}]}


class SmolTalk(RowTask):
    """HuggingFaceTB/smol-smoltalk: general conversations."""

    name, source, split = "SmolTalk", "smoltalk", None

    def __init__(self, paths: Paths, split: str = "train"):
        self._rows = load_rows(paths, self.source, self.split or split, SHAPE)
        for path, table in zip(self._rows.files, self._rows.tables, strict=True):
            if isinstance(table, pa.Table):
                _check_roles(table.column("messages"), str(path))

    def __getitem__(self, index: int) -> dict:
        return {"messages": self._rows[index]["messages"]}


def _check_roles(conversations: pa.ChunkedArray, path: str) -> None:
    """Raise UserError, with its row, for the first conversation whose roles do not alternate.

    Hundreds of thousands of conversations have only some dozens of different sequences of roles.
    """
    roles = iter(pc.struct_field(pc.list_flatten(conversations), "role").to_pylist())
    known = set()
    for row, length in enumerate(pc.list_value_length(conversations).to_pylist(), 1):
        sequence = tuple(islice(roles, length))
        if sequence not in known:
            with at_place(f"{path}, row {row}"):
                check_conversation({"messages": [{"role": role, "content": ""} for role in sequence]})
            known.add(sequence)
