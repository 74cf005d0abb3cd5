"""Inference: the engine with its cache and sampling, a chat session, the calculator tool, and the sandbox for generated code."""
