"""`python -m benchmarks.alignment`."""

import sys

from benchmarks.alignment.command import main

if __name__ == "__main__":
    sys.exit(main())
