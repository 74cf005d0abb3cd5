"""Reads text and conversations, and makes batches of tokens from them."""
