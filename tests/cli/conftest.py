"""What the tests of all commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from string import ascii_lowercase

import pytest
from models import TEXT, small_pipe, small_text_encoder, small_unet
from transformers import CLIPTokenizer

from fdcompile.cli.cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small pipeline of random weights that takes prompts."""
    folder = tmp_path_factory.mktemp("model")
    tokens = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    pipe = small_pipe()
    unet = small_unet(up_block_types=("UpBlock2D", "UpBlock2D"))  # most of what a capture takes is attention's
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT[0])
    pipe.register_modules(unet=unet, tokenizer=tokenizer, text_encoder=small_text_encoder(tokenizer))
    pipe.save_pretrained(folder / "pipe")
    return str(folder / "pipe")


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that is refused, and returns the one line that says why, without its beginning."""

    def refuse(*arguments: str) -> str:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        *told, error = captured.err.splitlines()
        assert all(line.startswith("  ") for line in told), "besides the error there is only what was being done"
        assert error.startswith("fdcompile: error: ")
        return error.removeprefix("fdcompile: error: ")

    return refuse


def rows(table: str) -> dict[str, list[str]]:
    """Rows of a table by name; cells are two spaces or more apart."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}
