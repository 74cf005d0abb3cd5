"""The speedrun: its stages, the records of finished ones, and the data that it reads."""
