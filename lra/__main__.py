"""`python -m lra COMMAND ...`, see lra/cli.py."""

import sys

from lra.cli import main

if __name__ == "__main__":
    sys.exit(main())
