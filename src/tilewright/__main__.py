"""`python -m tilewright`: the command line of `tilewright.tools.cli`."""

import sys

from tilewright.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
