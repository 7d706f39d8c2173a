"""`python -m bench SUITE …`, which `python3 dev.py bench` calls."""

import sys

from bench.harness import main

if __name__ == "__main__":
    sys.exit(main())
