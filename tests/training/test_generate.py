"""Sampling and evaluating from a finished run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.config import write_config
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.evaluate import compressed_bits, eval_file, evaluate
from hope_jax.training.generate import check_prompt, generate_bytes, generate_text, token_pieces
from hope_jax.training.load import load_run
from hope_jax.training.run_dir import read_seen_bytes
from hope_jax.training.step import token_losses
from hope_jax.training.vocabulary import load_vocabulary

ALL = list(range(256))


@pytest.fixture(scope="module")
def run(trained):
    return load_run(trained)


def generate(run, prompt=b"line 1: ", **changes):
    settings = {"seen_bytes": ALL, "max_bytes": 12, "temperature": 1.0} | changes
    return list(generate_bytes(run.program.lm, run.state.params, prompt, **settings))


def test_greedy_is_the_argmax_of_the_parallel_pass(run):
    prompt = b"line 7: the"
    made = generate(run, prompt, temperature=0)
    text = jnp.array([list(prompt) + made])
    _, logits = run.program.lm.apply(run.state.params, run.program.lm.init_state(run.state.params, 1), text, phase=0)
    assert made == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["hope", "hope_attention"])
@pytest.mark.slow
def test_greedy_is_the_argmax_of_the_parallel_pass_for_every_model(name):
    """The prompt ends inside a chunk, and the continuation crosses several."""
    config = ModelConfig(name=name, dim=16, layers=1, heads=2, memory_hidden=8, cms_hidden=(16, 16), max_length=64)
    lm = build_lm(config)
    params = lm.init(jax.random.key(0))
    prompt = b"a prompt of"
    made = list(generate_bytes(lm, params, prompt, seen_bytes=ALL, max_bytes=10, temperature=0))
    _, logits = lm.apply(params, lm.init_state(params, 1), jnp.array([list(prompt) + made]), phase=0)
    assert made == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def test_seed_decides(run):
    assert generate(run, seed=1) == generate(run, seed=1)
    assert generate(run, seed=1) != generate(run, seed=2)


def test_top_1_is_greedy(run):
    assert generate(run, top_k=1, temperature=2.0) == generate(run, temperature=0)


def test_only_bytes_of_the_training_text_are_produced(run, trained):
    seen = read_seen_bytes(trained)
    assert len(seen) < 64
    assert set(generate(run, seen_bytes=seen, temperature=1e6, max_bytes=50)) <= set(seen)
    assert not set(generate(run, temperature=1e6, max_bytes=50)) <= set(seen)  # the test can fail


def test_characters_appear_when_they_are_complete():
    pieces = list(token_pieces("añ→🎉".encode(), load_vocabulary("bytes")))
    assert "".join(pieces) == "añ→🎉"
    assert pieces[1:3] == ["", "ñ"]
    assert "".join(token_pieces(b"a\xff\xe2\x86", load_vocabulary("bytes"))) == "a��"


def test_tokens_are_decoded_together_with_those_before_them(tmp_path):
    """A decoder that leaves out the space before the first word of a text, and one whose tokens are parts of "é"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "words.json"))
    words = load_vocabulary(str(tmp_path / "words.json"))
    prompt = words.encode(["one two"])[0].tolist()
    assert list(token_pieces([2, 0], words, prompt)) == [" three", " one", ""]
    assert list(token_pieces([2, 0], words)) == ["three", " one", ""]
    tokenizer = Tokenizer(models.WordLevel({"Ã": 0, "©": 1, "a": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "bytes.json"))
    assert list(token_pieces([0, 1, 0], load_vocabulary(str(tmp_path / "bytes.json")), [2])) == ["", "é", "", "�"]


def test_prompt_with_unseen_bytes_names_them():
    with pytest.raises(UserError, match=r"never saw in training: 0xA9, 0xC3; .*data=FILE"):
        check_prompt("é".encode(), list(range(128)))
    with pytest.raises(UserError, match="and 2 more"):
        check_prompt(bytes(range(10)), [])
    assert check_prompt(b"", [10, 65]) == b"\n"
    assert check_prompt(b"", [65]) == b"A"


def test_generated_text_opens_with_the_prompt(trained):
    options = {"max_bytes": 10, "temperature": 0.8, "top_k": 4, "seed": 0}
    text = "".join(generate_text(trained, "line 3", **options))
    assert text.startswith("line 3") and len(text.encode()) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_bytes": 0}, "--max-bytes 0"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"max_bytes": 60}, "holds 64; lower --max-bytes"),
    ],
)
def test_bad_options(trained, change, message):
    options = {"max_bytes": 10, "temperature": 0.8, "top_k": 4, "seed": 0} | change
    with pytest.raises(UserError, match=message):
        "".join(generate_text(trained, "line 3", **options))


@pytest.mark.parametrize(
    "text", ["", "{", "3", "{}", '{"sha256": "a", "seen_bytes": []}', '{"sha256": 1, "seen_bytes": [9]}']
)
def test_damaged_facts_of_the_corpus(small, tmp_path, text):
    write_config(small, tmp_path)
    (tmp_path / "corpus.json").write_text(text)
    with pytest.raises(UserError, match=r"corpus.json is damaged; .*train the run again"):
        read_seen_bytes(tmp_path)


def test_evaluation_is_the_mean_over_every_byte(run, text_file):
    data = np.frombuffer(text_file.read_bytes()[:100], np.uint8)
    windows = [data[start : start + 17] for start in range(0, 99, 16)]
    losses = [token_losses(run.program.lm, run.state.params, jnp.asarray(window)[None]) for window in windows]
    expected = sum(float(loss.sum()) for loss in losses) / 99 / np.log(2)
    assert evaluate(run.program, run.state.params, data, run.config) == pytest.approx(expected, rel=1e-5)


def test_evaluation_that_is_not_finite_is_a_failure(run, text_file):
    data = np.frombuffer(text_file.read_bytes()[:100], np.uint8)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, run.state.params)
    with pytest.raises(RunFailed, match=r"gave nan bits per byte.*smaller learning_rate"):
        evaluate(run.program, broken, data, run.config)


def test_eval_file(trained, text_file, tmp_path):
    line = eval_file(trained, text_file)
    size = text_file.stat().st_size
    assert f"bits per byte over {size - 1:,} bytes" in line and "gzip" in line and "note" not in line
    other = tmp_path / "other.txt"
    other.write_text("été " * 30)
    assert "note: 120 of the bytes have values that never occurred" in eval_file(trained, other)


def test_compressors():
    rng = np.random.default_rng(0)
    noise = compressed_bits(rng.integers(0, 256, 20_000).astype(np.uint8))
    assert all(8 <= value < 8.2 for value in noise.values())
