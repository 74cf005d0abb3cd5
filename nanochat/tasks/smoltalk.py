"""SmolTalk: general conversations, for training."""

from nanochat.platform.paths import Paths
from nanochat.tasks.rows import load_rows


class SmolTalk:
    """HuggingFaceTB/smol-smoltalk: general conversations."""

    name, source, split = "SmolTalk", "smoltalk", None

    def __init__(self, paths: Paths, split: str = "train"):
        rows, self.files = load_rows(paths, self.source, self.split or split, ("messages",))
        self._messages = rows.column("messages")

    def __len__(self) -> int:
        return len(self._messages)

    def __getitem__(self, index: int) -> dict:
        return {"messages": self._messages[index].as_py()}
