"""Measures models and the tokenizer: bits per byte, CORE, chat tasks, compression."""
