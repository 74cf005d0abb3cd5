"""Conversations about the model itself, for training."""

from nanochat.tasks.smoltalk import SmolTalk


class Identity(SmolTalk):
    """Conversations about the model itself: chat/identity/conversations.jsonl, one array of messages per line."""

    name, source, split = "Identity", "identity", "conversations"
