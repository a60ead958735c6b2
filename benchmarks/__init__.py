"""Benchmarks: `make bench`. Results in bench-output/, what to read into them in NOTES.md."""
