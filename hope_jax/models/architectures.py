"""The architectures, side by side: each is a mixer over time and a map of each token.

A mixer is softmax attention, or a `SequenceLayer` inside the same norm, gate and map out (`mixer.py`). Most sequence
layers are `memory_layer`: projections make the tokens, and a nest with its memory, objective, rule and clock does the
rest, so one line tells two architectures apart. What follows the mixer is a SwiGLU or a CMS chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hope_jax.gates import Gates, discretised, fixed_decay, no_gates, read_outs, retained, step_size, titans_gates
from hope_jax.memories import mlp_memory
from hope_jax.memory_layer import Projections, memory_layer
from hope_jax.miras import memora, moneta, yaad
from hope_jax.oja import oja
from hope_jax.omega import atlas, omega
from hope_jax.recurrent import lstm, self_referential
from hope_jax.rwkv7 import rwkv7
from hope_jax.self_modifying import SelfModifyingConfig, self_modifying
from hope_jax.sequence import (
    closed_loop,
    comba,
    deep_linear_attention,
    delta_net,
    gated_delta_net,
    gated_linear_attention,
    linear_attention,
    linear_attention_pp,
    ttt_linear,
    ttt_mlp,
)
from hope_jax.sequence_layer import SequenceLayer, l2_normalize
from hope_jax.titans import titans_lmm
from hope_jax.types import Tokens

from .attention import Attention
from .mixer import Mixer
from .titans_attention import GatedByMemory, MemoryThenAttention, memory_as_context
from .window_attention import WindowAttention

if TYPE_CHECKING:
    from .config import ModelConfig


class Architecture(NamedTuple):
    """What a language model's blocks are made of."""

    mixers: tuple[Callable[[ModelConfig, nnx.Rngs], nnx.Module], ...]  # of consecutive layers; a hybrid has several
    channel: Literal["mlp", "cms"] = "mlp"  # what follows a mixer
    rotary: bool = False  # turns queries and keys by their position, in pairs of channels
    cache: bool = False  # keeps keys and values, of at most `max_length` tokens
    chunked: bool = False  # reads what whole chunks of `chunk_mem` tokens wrote
    running_read: bool = False  # or, with read="before", what single tokens did
    projections: bool = False  # writes its projections too, every `chunk_proj` tokens


# --- sequence layers --------------------------------------------------------------------------------------------------


def _linear_attention(c: ModelConfig) -> SequenceLayer:
    return memory_layer(linear_attention(*c.head_widths), _projections(c, feature=_positive))


def _retnet(c: ModelConfig) -> SequenceLayer:
    """Without the rotation of queries and keys of the published layer."""
    return memory_layer(gated_linear_attention(*c.head_widths), _projections(c, fixed_decay(c.heads)))


def _mamba2(c: ModelConfig) -> SequenceLayer:
    tokens = _projections(c, discretised(), feature=_identity, key_heads=1)
    return memory_layer(gated_linear_attention(*c.head_widths), tokens, skip=True)


def _delta_net(c: ModelConfig) -> SequenceLayer:
    return memory_layer(delta_net(*c.head_widths), _projections(c, read_outs(eta=_erase(c))))


def _gated_delta_net(c: ModelConfig) -> SequenceLayer:
    gates = read_outs(eta=_erase(c), log_alpha=retained(0.99))
    return memory_layer(gated_delta_net(*c.head_widths), _projections(c, gates))


def _ttt_linear(c: ModelConfig) -> SequenceLayer:
    gates = read_outs(eta=step_size(c.eta_init))
    return memory_layer(ttt_linear(*c.head_widths, c.chunk_mem), _projections(c, gates), learned_start=True)


def _ttt_mlp(c: ModelConfig) -> SequenceLayer:
    memory = mlp_memory(c.head_width, c.memory_hidden)
    gates = read_outs(eta=step_size(c.eta_init))
    return memory_layer(ttt_mlp(memory, c.chunk_mem), _projections(c, gates), learned_start=True)


def _deep_linear_attention(c: ModelConfig) -> SequenceLayer:
    memory = mlp_memory(c.head_width, c.memory_hidden)
    gates = read_outs(eta=step_size(c.eta_init), log_alpha=retained(0.99))
    return memory_layer(deep_linear_attention(memory, c.chunk_mem), _projections(c, gates), learned_start=True)


def _titans(c: ModelConfig) -> SequenceLayer:
    memory = mlp_memory(c.head_width, c.memory_hidden, residual=False)
    tokens = _projections(c, titans_gates(c.eta_init))
    return memory_layer(titans_lmm(memory, c.chunk_mem, read=c.read), tokens, learned_start=True)


def _titans_mac(c: ModelConfig) -> SequenceLayer:
    return memory_as_context(
        c.dim,
        c.heads,
        hidden=c.memory_hidden,
        segment=c.chunk_mem,
        persistent=c.persistent,
        eta_init=c.eta_init,
        theta=c.rope_theta,
    )


def _lstm(c: ModelConfig) -> SequenceLayer:
    return lstm(c.dim)


def _self_referential(c: ModelConfig) -> SequenceLayer:
    return self_referential(c.dim, c.heads)


def _comba(c: ModelConfig) -> SequenceLayer:
    def start(key: jax.Array, heads: int):
        del key
        return {"b": jnp.ones(heads), "d": jnp.full(heads, 0.02)}

    def loop(params, tokens: Tokens) -> Tokens:
        return closed_loop(tokens, jax.nn.sigmoid(params["b"]), params["d"])

    gates = read_outs(eta=_erase(c), log_alpha=retained(0.99))
    return memory_layer(comba(*c.head_widths), _projections(c, gates), adjust=loop, adjust_init=start)


def _oja(c: ModelConfig) -> SequenceLayer:
    def unit_values(params, tokens: Tokens) -> Tokens:  # what contracts here are the values
        del params
        return tokens._replace(value=l2_normalize(tokens.value))

    gates = read_outs(eta=_erase(c), log_alpha=retained(0.99))
    return memory_layer(oja(*c.head_widths), _projections(c, gates), adjust=unit_values)


def _linear_attention_pp(c: ModelConfig) -> SequenceLayer:
    """Where its two matrices start is learned; the attention's starts empty."""
    tokens = _projections(c, feature=_positive)
    return memory_layer(linear_attention_pp(c.head_width), tokens, learned_start=True)


def _omega(c: ModelConfig) -> SequenceLayer:
    """Without the polynomial features of the published keys; so is Atlas."""
    memory = mlp_memory(c.head_width, c.memory_hidden)
    gates = read_outs(eta=step_size(c.eta_init / c.omega_window), log_alpha=retained(0.99))
    rule = omega(memory, c.head_widths, c.chunk_mem, c.omega_window)
    return memory_layer(rule, _projections(c, gates), learned_start=True)


def _atlas(c: ModelConfig) -> SequenceLayer:
    memory = mlp_memory(c.head_width, c.memory_hidden)
    gates = read_outs(eta=step_size(c.eta_init), log_alpha=retained(0.99), log_mu=retained(0.9))
    rule = atlas(memory, c.head_widths, c.chunk_mem, c.omega_window)
    return memory_layer(rule, _projections(c, gates), learned_start=True)


def _miras(c: ModelConfig) -> SequenceLayer:
    variant = {"moneta": moneta, "yaad": yaad, "memora": memora}[c.miras]
    gates = read_outs(eta=step_size(c.eta_init), log_alpha=retained(0.99))
    memory = mlp_memory(c.head_width, c.memory_hidden)
    return memory_layer(variant(memory, c.chunk_mem), _projections(c, gates), learned_start=True)


def _self_modifying(c: ModelConfig) -> SequenceLayer:
    return self_modifying(
        SelfModifyingConfig(
            dim=c.dim,
            heads=c.heads,
            memory=c.memory,
            memory_hidden=c.memory_hidden,
            objective=c.objective,
            chunk_proj=c.chunk_proj,
            chunk_mem=c.chunk_mem,
            stage=c.stage,
            read=c.read,
            adaptive_q=c.adaptive_q,
            static=c.static,
            momentum=c.momentum,
            retention=c.retention,
            dgd_decay=c.dgd_decay,
            exact=c.exact,
            mlp_rule=c.mlp_rule,
            conv_window=c.conv_window,
            value_norm=c.value_norm,
            error_clip=c.error_clip,
            surprise=c.surprise,
            surprise_temperature=c.surprise_temperature,
            gate_retention=c.gate_retention,
            eta_init=c.eta_init,
            remat=c.remat != "none",
        )
    )


# --- their parts ------------------------------------------------------------------------------------------------------


def _projections(c: ModelConfig, gates: Gates | None = None, **changes) -> Projections:
    widths = c.head_widths
    return Projections(c.dim, c.heads, *widths, gates or no_gates(), conv_window=c.conv_window, **changes)


def _erase(c: ModelConfig):
    return step_size(c.erase_max / 2, most=c.erase_max)


def _positive(x: jax.Array) -> jax.Array:
    """The feature map of linear attention (arXiv:2006.16236)."""
    return jax.nn.elu(x) + 1


def _identity(x: jax.Array) -> jax.Array:
    return x


# --- mixers -----------------------------------------------------------------------------------------------------------


def _mix(layer: Callable[[ModelConfig], SequenceLayer]) -> Callable[[ModelConfig, nnx.Rngs], nnx.Module]:
    def make(c: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
        return Mixer(layer(c), dim=c.dim, heads=c.heads, gated=c.out_gate, out_gain=c.out_gain, rngs=rngs)

    return make


def _attention(c: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    return Attention(
        c.dim,
        c.heads,
        capacity=c.max_length,
        theta=c.rope_theta,
        kv_heads=c.kv_heads,
        head_width=c.head_width,
        scaling=c.rope_llama3,
        out_gain=c.out_gain,
        rngs=rngs,
    )


def _rwkv7(c: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """Its norm and its gate are inside."""
    return Mixer(rwkv7(c.dim, c.heads), dim=c.dim, heads=None, gated=False, out_gain=c.out_gain, rngs=rngs)


def _window_attention(c: ModelConfig, rngs: nnx.Rngs) -> WindowAttention:
    return WindowAttention(c.dim, c.heads, window=c.window, theta=c.rope_theta, out_gain=c.out_gain, rngs=rngs)


def _titans_mag(c: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    attention = _titans_window(c, 1.0, rngs)
    return GatedByMemory(attention, _titans(c), dim=c.dim, heads=c.heads, out_gain=c.out_gain, rngs=rngs)


def _titans_mal(c: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    return MemoryThenAttention(_titans_window(c, c.out_gain, rngs), _titans(c), dim=c.dim, heads=c.heads, rngs=rngs)


def _titans_window(c: ModelConfig, out_gain: float, rngs: nnx.Rngs) -> WindowAttention:
    sizes = {"window": c.window, "theta": c.rope_theta, "persistent": c.persistent}
    return WindowAttention(c.dim, c.heads, **sizes, out_gain=out_gain, rngs=rngs)


ARCHITECTURES: dict[str, Architecture] = {
    "hope": Architecture((_mix(_self_modifying),), channel="cms", chunked=True, running_read=True, projections=True),
    "hope_attention": Architecture((_attention,), channel="cms", cache=True, rotary=True),
    "self_modifying_titans": Architecture((_mix(_self_modifying),), chunked=True, running_read=True, projections=True),
    "titans": Architecture((_mix(_titans),), chunked=True, running_read=True),
    "titans_mac": Architecture((_mix(_titans_mac),), rotary=True),
    "titans_mag": Architecture((_titans_mag,), rotary=True, chunked=True, running_read=True),
    "titans_mal": Architecture((_titans_mal,), rotary=True, chunked=True, running_read=True),
    "ttt_linear": Architecture((_mix(_ttt_linear),)),
    "ttt_mlp": Architecture((_mix(_ttt_mlp),)),
    "dla": Architecture((_mix(_deep_linear_attention),), chunked=True),
    "omega": Architecture((_mix(_omega),), chunked=True),
    "atlas": Architecture((_mix(_atlas),), chunked=True),
    "miras": Architecture((_mix(_miras),), chunked=True),
    "comba": Architecture((_mix(_comba),)),
    "oja": Architecture((_mix(_oja),)),
    "delta_net": Architecture((_mix(_delta_net),)),
    "gated_delta_net": Architecture((_mix(_gated_delta_net),)),
    "rwkv7": Architecture((_rwkv7,)),
    "mamba2": Architecture((_mix(_mamba2),)),
    "retnet": Architecture((_mix(_retnet),)),
    "linear_attention": Architecture((_mix(_linear_attention),)),
    "linear_attention_pp": Architecture((_mix(_linear_attention_pp),)),
    "samba": Architecture((_mix(_mamba2), _window_attention), rotary=True),
    "swa": Architecture((_window_attention,), rotary=True),
    "transformer": Architecture((_attention,), cache=True, rotary=True),
    "lstm": Architecture((_mix(_lstm),)),
    "srwm": Architecture((_mix(_self_referential),)),
}
