"""The report of a run: what each stage was given and gave, as markdown and as one self-contained HTML file."""
