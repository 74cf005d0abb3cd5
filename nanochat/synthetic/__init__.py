"""The embedded data: a small invented world as text, conversations and tests, in the layouts of the real data sets."""
