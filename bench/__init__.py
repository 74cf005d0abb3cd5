"""Benchmarks: pytest-benchmark suites, which `make bench` runs, results/<machine>/ and NOTES.md."""
