"""What is installed, and what importing it costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "accelerate",
    "diffusers",
    "skimage",
    "tensorrt",
    "tensorrt_rtx",
    "torch._inductor",
    "torch_tensorrt",
    "transformers",
)


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    """The wheel, built from a copy of the tree: an older build lying about must not get into it."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    generated = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=generated)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree)
    (path,) = (tree / "dist").iterdir()
    with ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_every_file_of_the_package_once_and_nothing_else(wheel: ZipFile) -> None:
    files = (path for path in (ROOT / "fdcompile").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = sorted(path.relative_to(ROOT).as_posix() for path in files)
    assert {"fdcompile/py.typed", "fdcompile/miniature/MODEL_CARD.md", "fdcompile/passes/bind.py"} <= set(expected)
    assert sorted(name for name in wheel.namelist() if ".dist-info/" not in name) == expected


def test_the_wheel_installs_a_command_that_exists(wheel: ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "fdcompile = fdcompile.cli.cli:main" in wheel.read(entry_points).decode().splitlines()
    assert "fdcompile/cli/cli.py" in wheel.namelist()


@pytest.mark.parametrize("room", ["passes", "backends"])
def test_the_top_level_shows_the_rooms_as_relative_links(room: str) -> None:
    link = ROOT / room
    assert link.readlink() == Path("fdcompile") / room
    assert (link / "__init__.py").is_file()


def test_importing_the_package_loads_nothing_heavy_and_no_cuda() -> None:
    program = (
        "import fdcompile, sys, torch\n"
        f"print([name for name in {HEAVY} if name in sys.modules], torch.cuda.is_initialized())"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT) == "[] False"
