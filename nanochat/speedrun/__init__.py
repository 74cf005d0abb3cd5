"""The speedrun: its stages, the records of finished stages, and the data that it reads."""
