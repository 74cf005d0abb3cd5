"""Measurements: pytest-benchmark suites, results/<machine>/ and NOTES.md. `make bench` runs the suites."""
