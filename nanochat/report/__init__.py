"""The report of a run: the settings and results of each stage, as markdown and as one self-contained HTML file."""
