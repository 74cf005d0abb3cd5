"""Training: the loop that every stage runs, and the stages: pretraining, midtraining, fine-tuning."""
