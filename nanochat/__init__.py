"""nanochat: a small ChatGPT-like model, from raw text to a chat in one run."""

__version__ = "0.1.0"
