"""Text and conversations: where they come from and how they become batches."""
