"""Talking with a trained model."""
