"""Llama checkpoints: the imported model is the original's function, in NumPy and, if it is there, in transformers."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hope_jax.models import build_lm, load_llama, stack_levels
from hope_jax.models.llama import llama_config

D, F, H, G, K, L, V, T = 8, 12, 4, 2, 6, 2, 24, 13  # D / H is not K
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FIELDS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": K,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
    "rope_scaling": LLAMA3,
}


def _weights(tied):
    draw = np.random.default_rng(0).normal
    shapes = {"self_attn.q_proj": (H * K, D), "self_attn.k_proj": (G * K, D), "self_attn.v_proj": (G * K, D)}
    shapes |= {"self_attn.o_proj": (D, H * K)}
    shapes |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    weights = {"model.embed_tokens.weight": draw(size=(V, D)), "model.norm.weight": 1 + 0.2 * draw(size=D)}
    for i in range(L):
        weights |= {f"model.layers.{i}.{name}.weight": draw(size=s) * s[1] ** -0.5 for name, s in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = 1 + 0.2 * draw(size=D)
    return weights if tied else {**weights, "lm_head.weight": draw(size=(V, D)) * D**-0.5}


def _save(folder, fields, weights, dtype=np.float32, shards=1):
    """A folder as others write it: config.json and one file, or several with an index."""
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    (folder / "config.json").write_text(json.dumps(fields))
    names = [
        f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)
    ]
    where = {name: names[i % shards] for i, name in enumerate(weights)}
    for file in names:
        save_file({n: np.ascontiguousarray(w) for n, w in weights.items() if where[n] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {name: w.astype(np.float64) for name, w in weights.items()}


def _frequencies(scaling):
    """Angles per token; "llama3" as it is published, case by case."""
    plain = [100.0 ** (-2 * i / K) for i in range(K // 2)]
    if not scaling:
        return np.array(plain)
    made, length = [], 32
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < length / 4.0:
            made.append(frequency)
        elif wavelength > length / 1.0:
            made.append(frequency / 8.0)
        else:
            smooth = (length / wavelength - 1.0) / (4.0 - 1.0)
            made.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    return np.array(made)


def _forward(w, tokens, scaling):
    """Logits of one row in float64, head by head and token by token."""
    rms = lambda x, gain: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * w[gain]  # noqa: E731
    angles = np.exp(1j * np.arange(len(tokens))[:, None] * _frequencies(scaling))  # [T, K / 2]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(L):
        of = lambda name, i=i: w[f"model.layers.{i}.{name}.weight"]  # noqa: E731
        r = rms(x, f"model.layers.{i}.input_layernorm.weight")
        q, k, v = (r @ of(f"self_attn.{n}_proj").T for n in "qkv")
        out = np.zeros((len(tokens), H * K))
        for h in range(H):
            mine, shared = slice(h * K, (h + 1) * K), slice(h // (H // G) * K, (h // (H // G) + 1) * K)
            a, b = ((p[:, : K // 2] + 1j * p[:, K // 2 :]) * angles for p in (q[:, mine], k[:, shared]))
            for t in range(len(tokens)):
                score = (a[t] * b[: t + 1].conj()).real.sum(-1) / np.sqrt(K)
                share = np.exp(score - score.max())
                out[t, mine] = share / share.sum() @ v[: t + 1, shared]
        x = x + out @ of("self_attn.o_proj").T
        r = rms(x, f"model.layers.{i}.post_attention_layernorm.weight")
        gate = r @ of("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (r @ of("mlp.up_proj").T)) @ of("mlp.down_proj").T
    return rms(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _logits(config, params, tokens):
    lm = build_lm(config)
    run = jax.jit(lambda params, tokens: lm.apply(params, lm.init_state(params, tokens.shape[0]), tokens, phase=0)[1])
    return np.asarray(run(params, jnp.asarray(tokens)))


CASES = {
    "shards, grouped heads, llama3, own head": (False, LLAMA3, np.float32, 3),
    "one file, tied head, bfloat16": (True, None, ml_dtypes.bfloat16, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_imported_model_is_the_plain_forward_pass(name, tmp_path, rng):
    tied, scaling, dtype, shards = CASES[name]
    fields = {**FIELDS, "rope_scaling": scaling, "tie_word_embeddings": tied}
    weights = _save(tmp_path, fields, _weights(tied), dtype, shards)
    config, params = load_llama(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = rng.integers(0, V, size=(2, T))
    expected = np.stack([_forward(weights, row, scaling) for row in tokens])
    np.testing.assert_allclose(_logits(config, params, tokens), expected, rtol=0, atol=1e-4)
    assert np.std(expected) > 0.5  # or the tolerance would mean nothing
    lm = build_lm(config)
    state, step = lm.init_state(params, 2), jax.jit(lm.apply)
    for t in range(T):  # the cache holds as many heads as keys have
        state, logits = step(params, state, jnp.asarray(tokens[:, t : t + 1]))
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_stacked_levels_start_at_the_imported_function(tmp_path, rng):
    """Exactly at learning rate 0; to rounding with steps that change no bit of a weight; and else they do adapt."""
    _save(tmp_path, FIELDS, _weights(tied=False))
    pretrained = load_llama(tmp_path)
    tokens = rng.integers(0, V, size=(1, T))
    logits = _logits(*pretrained, tokens)
    for eta, tolerance in ((0.0, 0.0), (1e-30, 1e-5)):
        stacked = stack_levels(pretrained, {0: 2, 1: 4}, eta=eta)
        np.testing.assert_allclose(_logits(*stacked, tokens), logits, rtol=0, atol=tolerance)
    adapting = _logits(*stack_levels(pretrained, {0: 2, 1: 4}, eta=0.1), tokens)
    moved = np.abs(adapting - logits).max(axis=(0, 2)) > 1e-4
    np.testing.assert_array_equal(moved, np.arange(T) >= 2)


def test_both_spellings_of_the_rotary_fields():
    """`rope_parameters` of newer files says what `rope_theta` and `rope_scaling` say in older ones."""
    newer = {name: value for name, value in FIELDS.items() if not name.startswith("rope")}
    newer["rope_parameters"] = {"rope_theta": 100.0, **LLAMA3}
    assert llama_config(newer) == llama_config(FIELDS)
    older = {**FIELDS, "rope_scaling": {"type": "default"}}
    assert llama_config(older).rope_llama3 == ()
    assert llama_config(FIELDS).max_length == 64
    assert llama_config(FIELDS, max_length=16).max_length == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'; only 'llama' is implemented"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"attention_bias": True}, "attention_bias=True; only False"),
        ({"mlp_bias": True}, "mlp_bias=True; only False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'; only 'default' and 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5; only 1.0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"num_key_value_heads": 3}, "kv_heads must divide heads; got kv_heads=3, heads=4"),
    ],
)
def test_what_is_not_implemented_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        llama_config({**FIELDS, **fields})


def test_folders_that_do_not_hold_the_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_llama(tmp_path)
    with pytest.raises(ValueError, match="lacks vocab_size"):
        llama_config({"model_type": "llama"})
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors"):
        load_llama(tmp_path)
    weights = _weights(tied=False)
    for changed, message in (
        ({n: w for n, w in weights.items() if "1.mlp.up" not in n}, r"asks for: model.layers.1.mlp.up_proj.weight"),
        ({**weights, "model.layers.0.mlp.up_proj.bias": np.zeros(F)}, "no place for: model.layers.0.mlp.up_proj.bias"),
        ({**weights, "lm_head.weight": np.zeros((V, D + 1))}, r"lm_head.weight has shape \(24, 9\), .* \(24, 8\)"),
    ):
        _save(tmp_path, FIELDS, changed)
        with pytest.raises(ValueError, match=message):
            load_llama(tmp_path)


ORIGINALS = {
    "grouped heads, llama3 scaling": {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 1e4, **LLAMA3}},
    "tied head, own head width": {"tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 4},
}


@pytest.mark.filterwarnings("ignore")  # those of the two packages are not ours
@pytest.mark.parametrize("name", ORIGINALS)
def test_the_original_gives_the_same_logits(name, tmp_path, rng):
    """A random model of transformers, saved by it in shards; needs the extra "llama"."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    fields = {**sizes, "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
    original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, **ORIGINALS[name])).eval()
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = rng.integers(0, 48, size=(2, 40))
    with torch.no_grad():
        expected = original(torch.tensor(tokens)).logits.numpy()
    config, params = load_llama(tmp_path)
    logits = _logits(config, params, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert np.std(expected) > 0.5
    stacked = stack_levels((config, params), {(0, 1): 4, 2: 8}, eta=0.0)
    np.testing.assert_allclose(_logits(*stacked, tokens), logits, rtol=0, atol=1e-5)
