"""The architectures, side by side: each is a mixer over time and a map of each token.

A mixer is softmax attention, or a `SequenceLayer` inside the same norm, gate and map out (`mixer.py`). Most sequence
layers are `memory_layer`: projections make the tokens, and a nest with its memory, objective, rule and clock does the
rest, so one line tells two architectures apart. What follows the mixer is a SwiGLU or a CMS chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
from flax import nnx

from hope_jax.gates import Gates, discretised, fixed_decay, no_gates, read_outs, retained, step_size
from hope_jax.memories import mlp_memory
from hope_jax.memory_layer import Projections, memory_layer
from hope_jax.recurrent import lstm, self_referential
from hope_jax.self_modifying import SelfModifyingConfig, self_modifying
from hope_jax.sequence import (
    deep_linear_attention,
    delta_net,
    gated_delta_net,
    gated_linear_attention,
    linear_attention,
    ttt_linear,
    ttt_mlp,
)
from hope_jax.sequence_layer import SequenceLayer
from hope_jax.titans import titans_lmm

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


# --- sequence layers --------------------------------------------------------------------------------------------------


def _linear_attention(c: ModelConfig) -> SequenceLayer:
    return memory_layer(linear_attention(*c.head_widths), _projections(c, feature=_positive))


def _retnet(c: ModelConfig) -> SequenceLayer:
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
    gates = read_outs(eta=step_size(c.eta_init), log_alpha=retained(0.99), log_mu=retained(0.5))
    return memory_layer(titans_lmm(memory, c.chunk_mem, read=c.read), _projections(c, gates), learned_start=True)


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


def _self_modifying(c: ModelConfig) -> SequenceLayer:
    return self_modifying(
        SelfModifyingConfig(
            dim=c.dim,
            heads=c.heads,
            memory_hidden=c.memory_hidden,
            chunk_proj=c.chunk_proj,
            chunk_mem=c.chunk_mem,
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
    return Attention(c.dim, c.heads, capacity=c.max_length, theta=c.rope_theta, out_gain=c.out_gain, rngs=rngs)


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
    "hope": Architecture((_mix(_self_modifying),), channel="cms", chunked=True),
    "hope_attention": Architecture((_attention,), channel="cms", cache=True, rotary=True),
    "self_modifying_titans": Architecture((_mix(_self_modifying),), chunked=True),
    "titans": Architecture((_mix(_titans),), chunked=True),
    "titans_mac": Architecture((_mix(_titans_mac),), rotary=True),
    "titans_mag": Architecture((_titans_mag,), rotary=True, chunked=True),
    "titans_mal": Architecture((_titans_mal,), rotary=True, chunked=True),
    "ttt_linear": Architecture((_mix(_ttt_linear),)),
    "ttt_mlp": Architecture((_mix(_ttt_mlp),)),
    "dla": Architecture((_mix(_deep_linear_attention),), chunked=True),
    "delta_net": Architecture((_mix(_delta_net),)),
    "gated_delta_net": Architecture((_mix(_gated_delta_net),)),
    "mamba2": Architecture((_mix(_mamba2),)),
    "retnet": Architecture((_mix(_retnet),)),
    "linear_attention": Architecture((_mix(_linear_attention),)),
    "samba": Architecture((_mix(_mamba2), _window_attention), rotary=True),
    "swa": Architecture((_window_attention,), rotary=True),
    "transformer": Architecture((_attention,), cache=True, rotary=True),
    "lstm": Architecture((_mix(_lstm),)),
    "srwm": Architecture((_mix(_self_referential),)),
}
