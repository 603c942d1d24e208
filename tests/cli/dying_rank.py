"""Run by a test under torchrun: `fdcompile` with these arguments, but rank 1 is killed once.

In its first life, at its second image, after writing half of its line.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from fdcompile.cli.cli import main
from fdcompile.tools.generate.store import ResultStore

append, written = ResultStore._append, []


def dying(self: ResultStore, line: dict[str, Any]) -> None:
    written.append(line)
    if len(written) == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        with self._manifest.open("a") as file:
            file.write('{"number": ')
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, line)


if __name__ == "__main__":
    ResultStore._append = dying  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
