"""The README's examples run as they stand, with fewer steps."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_examples_run(capsys):
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("range(100)", "range(3)"), scope)
    assert scope["y"].shape == (40, 8)
    assert scope["opt_state"][0].count == 3
    assert "loss on the first 16 tokens" in capsys.readouterr().out


def test_files_named_exist():
    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:hope_jax|kernels|tests|experiments)/[\w/.]+)`", README):
        assert (root / name).exists(), name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@", README)
