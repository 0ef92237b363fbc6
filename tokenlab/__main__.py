"""`python -m tokenlab`: the same as `tokenlab`."""

import sys

from tokenlab.cli import console

if __name__ == "__main__":
    sys.exit(console())
