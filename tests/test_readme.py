"""The README's examples run as they stand, with fewer steps."""

import re
from pathlib import Path

import jax

from hope_jax import online
from hope_jax.models import ModelConfig, build_lm

README = (Path(__file__).parent.parent / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run(capsys):
    scope: dict = {}
    for block in BLOCKS[:2]:
        exec(block.replace("range(100)", "range(3)"), scope)
    assert scope["y"].shape == (40, 8)
    assert scope["opt_state"][0].count == 3
    assert "loss on the first 16 tokens" in capsys.readouterr().out


def test_the_session_runs(tmp_path, monkeypatch):
    """On a small model, with few slots."""
    config = ModelConfig(name="hope_attention", dim=16, layers=1, cms_hidden=(32, 32), cms_chunks=(8, 32))
    small = online.Session(config, build_lm(config).init(jax.random.key(0)))
    monkeypatch.setattr(online, "from_run", lambda run: small)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(BLOCKS[2].replace("slots=64", "slots=2"), scope)
    assert scope["report"].levels[0].updates and scope["kept"].tokens and (tmp_path / "alice.hope").exists()
    assert len(BLOCKS) == 3


def test_files_named_exist():
    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:hope_jax|kernels|tests|experiments)/[\w/.]+)`", README):
        assert (root / name).exists(), name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@", README)
