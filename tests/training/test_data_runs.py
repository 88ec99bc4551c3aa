"""Runs on ingested data: mixed, tokenised, with documents; what is carried survives a resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from hope_jax.cli import main
from hope_jax.training.data import LaneBatches
from hope_jax.training.errors import UserError
from hope_jax.training.evaluate import eval_file
from hope_jax.training.generate import generate_text
from hope_jax.training.loop import train
from tests.training.conftest import LINES, records
from tests.training.test_ingest import tokenizer_file  # noqa: F401


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOPE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["carry", "carry_reset"])
def test_carried_memory_survives_an_interruption(small, table, tmp_path, monkeypatch, documents):
    import signal

    model = dataclasses.replace(small.model, name="delta_net")
    config = dataclasses.replace(small, model=model, data=str(table), documents=documents)
    whole = train(config, tmp_path / "whole")
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.device_get(whole.state.lanes)))
    make = LaneBatches.rows

    def make_and_interrupt(self, step, which):
        if step == 4:  # read ahead: some step before it is the last
            signal.raise_signal(signal.SIGINT)
        return make(self, step, which)

    with monkeypatch.context() as patch:
        patch.setattr(LaneBatches, "rows", make_and_interrupt)
        first = train(config, tmp_path / "run")
    assert first.interrupted and int(first.state.step) < 6
    second = train(config, tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(second.state), jax.device_get(whole.state))
    assert records(second.run_dir) == records(whole.run_dir)


def test_a_tokenised_run_on_packed_documents(small, table, tokenizer_file, tmp_path, monkeypatch):  # noqa: F811
    from tokenizers import Tokenizer, decoders

    words = tmp_path / "words.json"
    words.write_bytes(tokenizer_file.read_bytes())
    config = dataclasses.replace(small, data=f"{table}:3,{table}:1", documents="reset", sample_bytes=0, steps=3)
    with pytest.raises(UserError, match=r"vocab_size=256 is smaller than the 300 tokens of tokenizer=.*vocab_size=300"):
        train(dataclasses.replace(config, tokenizer=str(words)), tmp_path / "run")
    model = dataclasses.replace(config.model, vocab_size=300)
    config = dataclasses.replace(config, tokenizer=str(words), model=model)
    result = train(config, tmp_path / "run")
    losses = [record for record in records(tmp_path / "run") if "loss" in record]
    per_token = result.corpus.bytes_per_token("train")
    assert per_token > 1.1
    assert losses[0]["bits_per_byte"] == pytest.approx(losses[0]["loss"] / np.log(2) / per_token)
    assert result.validation_bpb == pytest.approx(np.log2(300) / per_token, rel=0.1)  # nothing is known yet
    words.unlink()  # the run has its own copy
    config = dataclasses.replace(config, steps=4)
    again = train(config, tmp_path / "run", resume=True)
    assert again.started_at == 3 and int(again.state.step) == 4
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    with pytest.raises(UserError, match="no such file: tokenizer="):  # another run begins with what its config names
        train(config, tmp_path / "run", overwrite=True)
    options = {"max_bytes": 8, "temperature": 1.0, "top_k": 0, "seed": 0}
    text = "".join(generate_text(tmp_path / "run", "line 3", **options))
    assert text.startswith("line 3") and len(text) > 6
    own = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json"))
    own.decoder = decoders.Sequence([own.decoder, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    own.save(str(tmp_path / "run" / "tokenizer.json"))  # it leaves out the space that a text begins with
    made = own.encode(" is").ids
    monkeypatch.setattr("hope_jax.training.generate.generate_bytes", lambda *_, **__: iter(made))
    assert "".join(generate_text(tmp_path / "run", "line 3", **options)) == "line 3 is"
    assert "".join(generate_text(tmp_path / "run", "", **options)) == "is"  # nothing is before it
    other = tmp_path / "other.txt"
    other.write_text("".join(LINES[:20]))
    assert "bits per byte over" in eval_file(tmp_path / "run", other)


def test_inspect(table, tmp_path, capsys):
    assert main(["data", "inspect", f"{table}:3,{table}:1", "documents=reset", "seq_len=64", "model=delta_net"]) == 0
    shown = capsys.readouterr().out
    assert "75.0%" in shown and "25.0%" in shown and "packing efficiency" in shown and shown.count("sample ") == 3
    samples = shown.partition("sample 1")[2]
    assert samples.count("▐line ") >= 3 and "its cube is" in samples
    assert main(["data", "inspect", "smoke"]) == 0
    assert main(["data", "inspect", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
