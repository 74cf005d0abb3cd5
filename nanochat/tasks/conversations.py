"""Plain conversations for training: SmolTalk, and who the model is."""

from nanochat.paths import Paths
from nanochat.tasks.sources import load_rows


class SmolTalk:
    """HuggingFaceTB/smol-smoltalk: general conversations."""

    name, source, split = "SmolTalk", "smoltalk", None

    def __init__(self, paths: Paths, split: str = "train"):
        self._messages = load_rows(paths, self.source, self.split or split, ("messages",)).column("messages")

    def __len__(self) -> int:
        return len(self._messages)

    def __getitem__(self, index: int) -> dict:
        return {"messages": self._messages[index].as_py()}


class Identity(SmolTalk):
    """Conversations about the model itself: chat/identity/conversations.jsonl, one array of messages a line."""

    name, source, split = "Identity", "identity", "conversations"
