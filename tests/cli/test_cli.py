"""The command line as a whole: help, what it refuses at once, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fdcompile import __version__
from fdcompile.cli.cli import main
from fdcompile.cli.options import integer

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

HUGE = "99999999999999999999999"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "No such command 'paint'"),
        (["demo", "--key-steps", "often"], "'often': expected auto, paper, paper-personalized"),
        (["demo", "--key-steps", "0,1,"], "paper-if-3, all, a stride or steps"),
        (["demo", "--key-steps", "1,2"], "must begin with 0"),
        (["demo", "--key-steps", "0,5,3"], "strictly increasing"),
        (["demo", "--key-steps", "0"], "stride must be at least 1"),
        (["demo", "--recompute", "nothing"], "'nothing' is not one of 'encoder-propagation'"),
        (["demo", "--max-parallel-steps", "0"], "'0': expected a whole number of at least 1"),
        (["demo", "--steps", "many"], "'many': expected a whole number from 1 to 1000"),
        (["demo", "--steps", "1001"], "'1001': expected a whole number from 1 to 1000"),
        (["demo", "--guidance", "nan"], "nan: expected a number"),
        (["demo", "--seed", "-1"], "'-1': expected a whole number from 0"),
        (["demo", "--seed", HUGE], f"'{HUGE}': expected a whole number from 0 to {2**63 - 1}"),
        (["demo", "--backend", "abacus"], "'abacus' is not one of 'auto', 'eager', 'inductor'"),
        (["demo", "--output", "image.txt"], "image file"),
        (["demo", "--output", "no-such-folder/demo.png"], "there is no folder 'no-such-folder'"),
        (["explain", "--output", "demo.png"], "No such option: --output"),
        (["explain", "--steps", "8", "--key-steps", "0,8"], "[0, 8]: step 8 is out of range, 8 steps are 0 to 7"),
        (["demo", *["--prompt", "a"] * 17], "17 prompts: one batch holds at most 16"),
        (["demo", "--model", "./nowhere"], "./nowhere: there is no such folder"),
        (["demo", "--lora", "/nowhere"], "/nowhere: there is no such file or folder"),
        (["demo", "--lora", "loras/of/mine"], "loras/of/mine: there is no such file or folder"),
        (["demo", "--lora", "mine.safetensors"], "mine.safetensors: there is no such file or folder"),
        (["plan", "--output", "plan.json", "--converged", "3"], "--converged 3: expected at least the 50 of --steps"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    arguments: list[str], message: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdcompile.cli.loading.load_pipe", lambda *arguments: pytest.fail("it was loaded"))
    assert message in refusal(*arguments)


def test_the_largest_seed_is_taken() -> None:
    assert integer(0, 2**63 - 1)(str(2**63 - 1)) == 2**63 - 1


def test_refuses_a_folder_without_a_pipeline(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "no model_index.json" in refusal("demo", "--model", str(tmp_path))


def test_refuses_a_pipeline_without_prompts(tmp_path: Path, refusal: Callable[..., str]) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert refusal("demo", "--model", str(tmp_path)) == "DDPMPipeline takes no prompt"


def test_prints_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fdcompile {__version__}\n"


def test_help_and_refusals_load_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from fdcompile.cli.cli import main\n"
        "for command in ([], ['demo'], ['explain'], ['export']):\n"
        "    assert main([*command, '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers'}\n"
        "assert not heavy & set(sys.modules)\n"
        "assert main(['demo', '--seed', '-1']) == 2\n"
        "assert not heavy & set(sys.modules)\n"
        "assert main(['demo', '--steps', '8', '--key-steps', '0,8']) == 2\n"
        "assert main(['export', '--output', '.', '--format', 'onnx']) == 2\n"
        "assert main(['export', '--output', 'new', '--format', 'onnx', '--batch', '0']) == 2\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("demo", "explain", "export", "--model", "--key-steps", "--precision"):
        assert name in done.stdout


def test_is_a_module_too() -> None:
    command = [sys.executable, "-m", "fdcompile", "--version"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"fdcompile {__version__}\n")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_said_in_one_line(tmp_path: Path) -> None:
    """Ctrl-C while the stock pipeline samples its thousand steps."""
    command = [sys.executable, "-m", "fdcompile", "demo", "--steps", "1000"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        told = next(line for line in process.stderr if "warm-up" in line or line.startswith("Traceback"))
        assert told == "  stock, warm-up\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "fdcompile: interrupted\n")
    assert list(tmp_path.iterdir()) == []
