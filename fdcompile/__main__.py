"""``python -m fdcompile``: the command line."""

import sys

from fdcompile.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
