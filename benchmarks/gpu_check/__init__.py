"""`make gpu-check`: what a machine with a GPU can find out about this package in a quarter of an hour.

`steps.py` says which steps there are, in which order. `runner.py` runs each in a process of its own and keeps what it found,
so that a crash loses one step and a second call goes on where the first one stopped. `ledger.py` does the same for single
tests inside pytest. `page.py` writes what was found. The measurements are those of `make bench` and `make test-gpu`.
"""
