"""``python -m fdcompile``: the command line."""

import sys

from fdcompile.cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
