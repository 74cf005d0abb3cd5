"""The tokenizer: byte-pair encoding, the format of conversations, training."""
