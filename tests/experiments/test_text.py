"""Text of a file, of a folder, and its windows."""

import itertools

import numpy as np
import pytest

from experiments import text
from hope_jax.training.errors import UserError


def test_a_folder_with_one_text_is_that_text(tmp_path):
    (tmp_path / "input.txt").write_text("0123456789" * 10)
    (tmp_path / "README").write_text("not this")
    found = text.corpus(str(tmp_path))
    assert bytes(found.train) == b"0123456789" * 9 and bytes(found.validation) == b"0123456789"
    (tmp_path / "more.txt").write_text("two")
    text.corpus.cache_clear()
    with pytest.raises(UserError, match=r"should hold one .txt file; it holds input.txt, more.txt"):
        text.corpus(str(tmp_path))


def test_windows_predict_the_next_byte():
    source = np.random.default_rng(0).integers(256, size=500).astype(np.uint8)
    for batch in itertools.islice(text.stream(source, 0, 3, 16), 20):
        assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (3, 16)
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            window = bytes([tokens[0], *targets])
            assert window in source.tobytes() and bytes(tokens.tolist()) == window[:-1]
