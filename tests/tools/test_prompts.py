"""Lines of a file -> prompts."""

from __future__ import annotations

import pytest

from fdcompile.tools.generate.prompts import BadLine, Prompt, read_prompts


def test_a_line_is_a_prompt_and_its_number_makes_its_seed() -> None:
    lines = ["\ufeffa circle\n".encode(), b"\n", b"  a square  \r\n", "два круга".encode()]
    assert list(read_prompts(lines, 7, as_json=False)) == [
        Prompt(0, "a circle", 7),
        Prompt(2, "a square", 9),
        Prompt(3, "два круга", 10),
    ]


def test_an_object_may_have_a_seed_of_its_own() -> None:
    lines = [b'{"prompt": "a circle"}\n', b'{"prompt": "a square", "seed": 42}\n']
    assert list(read_prompts(lines, 7, as_json=True)) == [Prompt(0, "a circle", 7), Prompt(1, "a square", 42)]


@pytest.mark.parametrize(
    ("line", "as_json", "why"),
    [
        (b"caf\xe9", False, "line 2: 'utf-8' codec can't decode"),
        (b"a circle", True, "line 2: Expecting value"),
        (b"[1]", True, r"line 2: '[1]' is no object with a prompt"),
        (b'{"text": "a circle"}', True, "line 2: prompt=None: expected a text"),
        (b'{"prompt": " "}', True, "line 2: prompt=' ': expected a text"),
        (b'{"prompt": "a", "steps": 3}', True, "line 2: 'steps' is not known: expected prompt and seed"),
        (b'{"prompt": "a", "seed": -1}', True, "line 2: seed=-1: expected a whole number"),
    ],
)
def test_a_bad_line_is_named_and_the_others_go_on(line: bytes, as_json: bool, why: str) -> None:
    good = b'{"prompt": "good"}' if as_json else b"good"
    before, bad, after = read_prompts([good, line, good], 0, as_json)
    assert isinstance(before, Prompt) and isinstance(after, Prompt)
    assert isinstance(bad, BadLine)
    assert bad.why.startswith(why)
