"""Training: the loop that every stage runs, and the stages base, mid and sft."""
