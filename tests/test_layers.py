"""The folders import downwards only, and the tool that says so would notice if one did not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

UPWARD = {
    "graph/flops.py": "from fdcompile.passes import bind",
    "passes/simplify.py": "from fdcompile.runtime.clock import Clock",
    "backends/eager.py": "from fdcompile.passes.partition import partition",
    "runtime/runner.py": "if False:\n    from fdcompile.pipeline import hooks",
    "pipeline/check.py": "def inside():\n    import fdcompile.package.load",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package, without the miniature's weights, and of the contracts."""
    shutil.copytree(ROOT / "fdcompile", tmp_path / "fdcompile", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=tree, env={"PYTHONPATH": str(tree)}, capture_output=True, text=True)


def test_as_it_is_no_import_goes_up(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout
    assert "1 kept, 0 broken" in result.stdout


@pytest.mark.parametrize("path", UPWARD)
def test_an_import_that_goes_up_is_found(tree: Path, path: str) -> None:
    file = tree / "fdcompile" / path
    file.write_text(f"{file.read_text()}\n\n{UPWARD[path]}\n")
    result = lint(tree)
    assert result.returncode == 1, result.stdout
    assert f"fdcompile.{path.removesuffix('.py').replace('/', '.')} -> fdcompile." in result.stdout


def test_a_folder_that_no_layer_names_is_found(tree: Path) -> None:
    (tree / "fdcompile" / "attic").mkdir()
    (tree / "fdcompile" / "attic" / "__init__.py").touch()
    result = lint(tree)
    assert result.returncode == 1, result.stdout
    assert "attic" in result.stdout


def test_the_drawing_of_the_folders_is_the_list_of_folders() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    drawing = section.partition("```\n")[2].partition("```")[0].splitlines()
    drawn = [folder for line in drawing if "─▶" in line for folder in re.findall(r"\w+", line)]
    listed = re.findall(r"^\| `fdcompile/(\w+)/`", section, re.MULTILINE)
    assert listed == [*drawn, "miniature"]
    assert sorted(listed) == sorted(path.parent.name for path in (ROOT / "fdcompile").glob("*/__init__.py"))
