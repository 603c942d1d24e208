"""Files and directories that appear complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its name at the end of the block; if the block fails it is removed."""
    partial = path.with_name(f".partial-{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong in the block is what the user must see
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """An empty directory beside `folder`, which takes its name at the end of the block, as `atomic_write`.

    Raises:
        FileExistsError: at the end of the block `folder` holds something.
    """
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} has been filled meanwhile: choose another directory")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
