"""Inference: the engine with its cache and sampling, a chat session, the calculator, and the sandbox for generated code."""
