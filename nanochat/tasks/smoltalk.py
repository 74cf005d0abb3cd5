"""SmolTalk: general conversations, for training."""

from nanochat.platform.paths import Paths
from nanochat.tasks.rows import RowTask, checked, load_rows


class SmolTalk(RowTask):
    """HuggingFaceTB/smol-smoltalk: general conversations."""

    name, source, split = "SmolTalk", "smoltalk", None

    def __init__(self, paths: Paths, split: str = "train"):
        self._rows = load_rows(paths, self.source, self.split or split, ("messages",))

    def __getitem__(self, index: int) -> dict:
        return checked({"messages": self._rows[index]["messages"]}, self._rows.place(index))
