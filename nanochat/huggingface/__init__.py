"""Models in the layout of Hugging Face's transformers library: written for it, and read from it."""
