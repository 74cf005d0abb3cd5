"""Evaluation of models and of the tokenizer: bits per byte, CORE, chat tasks, compression."""
