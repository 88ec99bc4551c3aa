"""Llama checkpoints in the Hugging Face layout (config.json and *.safetensors) as a Transformer of ours.

Read from a folder, without network and without torch.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .build import build_lm
from .config import ModelConfig
from .stacking import Pretrained

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Our leaf -> their tensor; {} is the layer. Matrices other than the embedding are stored [out, in].
TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
    "blocks/mixer_norm/scale": "model.layers.{}.input_layernorm.weight",
    "blocks/mixer/wq": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/mixer/wk": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/mixer/wv": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/mixer/wo": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/mlp/norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/mlp/w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/mlp/w_up": "model.layers.{}.mlp.up_proj.weight",
    "blocks/mlp/w_down": "model.layers.{}.mlp.down_proj.weight",
}

# Fields that change the function: the one value that is implemented.
ONLY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def load_llama(folder: Path | str, *, max_length: int | None = None) -> Pretrained:
    """The model of a Llama-style folder.

    Args:
      folder: holds config.json and either model.safetensors or shards with their index.
      max_length: tokens the attention cache shall hold; None = 2048, or fewer if the model was made for fewer.

    Returns:
      `Pretrained(config, params)` for `build_lm` or `stack_levels`. Parameters are float32 whatever was stored; for
      narrow compute use `dataclasses.replace(config, dtype="bfloat16")`.

    Raises:
      FileNotFoundError: no folder, config.json or weights.
      ValueError: a field of config.json that is missing or has a value that is not implemented, or weights that do
        not fit it.
    """
    folder = Path(folder)
    config = llama_config(_json(folder / "config.json"), max_length=max_length)
    expected = jax.eval_shape(build_lm(config).init, jax.random.key(0))
    with contextlib.ExitStack() as stack:
        read, names = _open(folder, stack)
        _compare_names(names, config, folder)
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: _load(path, leaf.shape, read), expected)
    return Pretrained(config, params)


def llama_config(fields: Mapping[str, Any], *, max_length: int | None = None) -> ModelConfig:
    """Our config for the fields of a Llama config.json.

    Raises:
      ValueError: a field is missing or has a value that is not implemented; the message says which.

    Example:
      >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
      >>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
      >>> config = llama_config({"model_type": "llama", **sizes, **heads})
      >>> config.kv_heads, config.mlp_hidden, config.tie_embeddings
      (2, 40, False)
    """
    for field, only in ONLY.items():
        value = fields.get(field, "none" if field == "model_type" else only)
        if value != only:
            raise ValueError(
                f"config.json says {field}={value!r}; only {only!r} is implemented: use a Llama checkpoint without it"
            )
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [field for field in required if field not in fields]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; it is not the config of a Llama model")
    theta, scaling = _rope(fields)
    return ModelConfig(
        name="transformer",
        vocab_size=fields["vocab_size"],
        dim=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        kv_heads=fields.get("num_key_value_heads"),
        head_dim=fields.get("head_dim"),
        mlp_hidden=fields["intermediate_size"],
        max_length=max_length or min(2048, fields.get("max_position_embeddings", 2048)),
        rope_theta=theta,
        rope_llama3=scaling,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )


def _rope(fields: Mapping[str, Any]) -> tuple[float, tuple[float, ...]]:
    """Base and scaling of the rotary wavelengths, from `rope_parameters` or the older pair of fields."""
    rope = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    rope |= fields.get("rope_scaling") or {}
    rope |= fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json says partial_rotary_factor={rope['partial_rotary_factor']!r}; only 1.0 is implemented: "
            f"use a Llama checkpoint without it"
        )
    if kind == "default":
        return float(rope["rope_theta"]), ()
    if kind != "llama3":
        raise ValueError(
            f"config.json says rope_type={kind!r}; only 'default' and 'llama3' are implemented: use a Llama "
            f"checkpoint with one of these"
        )
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in numbers if name not in rope]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)} of its 'llama3' rope scaling")
    return float(rope["rope_theta"]), tuple(float(rope[name]) for name in numbers)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; load_llama needs a folder with config.json and *.safetensors")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the file again") from error


def _open(folder: Path, stack: contextlib.ExitStack) -> tuple[Callable[[str], np.ndarray], set[str]]:
    """A reader of single tensors, and their names; every shard is opened once and mapped, not loaded."""
    from safetensors import safe_open  # whoever does not read checkpoints does not wait for it

    sharded = (folder / INDEX).exists()
    index = _json(folder / INDEX).get("weight_map", {}) if sharded else {"": SINGLE}
    if not index:
        raise ValueError(f"{folder / INDEX} has no weight_map; copy the file again")
    files = sorted(set(index.values()))
    absent = [name for name in files if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}; copy the whole checkpoint (safetensors only)")
    shards = [stack.enter_context(safe_open(folder / name, framework="numpy")) for name in files]
    place = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118  not a mapping
    return lambda name: place[name].get_tensor(name), set(place)


def _compare_names(names: set[str], config: ModelConfig, folder: Path) -> None:
    """Refuse a missing tensor, and one without a place here, which would change the function."""
    ours = [name for leaf, name in TENSORS.items() if not (leaf == "head" and config.tie_embeddings)]
    wanted = {name.format(i) for name in ours for i in range(config.layers)}
    missing = sorted(wanted - names)
    if missing:
        raise ValueError(f"{folder} lacks tensors that its config.json asks for: {', '.join(missing[:3])}")
    # Frequencies and a head that is tied are stored for convenience.
    left = sorted(n for n in names - wanted - {TENSORS["head"]} if not n.endswith("rotary_emb.inv_freq"))
    if left:
        raise ValueError(f"{folder} holds tensors that this model has no place for: {', '.join(left[:3])}")


def _load(path: Any, shape: tuple[int, ...], read: Callable[[str], np.ndarray]) -> jax.Array:
    """One leaf of ours in float32, layer by layer, so that the checkpoint is never in memory as a whole."""
    ours = jax.tree_util.keystr(path, simple=True, separator="/")
    stacked = ours.startswith("blocks/")
    values = np.empty(shape, np.float32)
    for i in range(shape[0] if stacked else 1):
        name = TENSORS[ours].format(i)
        stored, place = read(name), values[i] if stacked else values
        if place.ndim == 2 and ours != "embedding":
            place = place.T
        if stored.shape != place.shape:
            raise ValueError(f"tensor {name} has shape {stored.shape}, config.json asks for {place.shape}")
        place[...] = stored
    return jnp.asarray(values)
