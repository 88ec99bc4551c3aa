"""Mixers and blocks as float64 NumPy for one row, written from the formulas and not from the library.

Each mixer takes its parameters, its normalised input [T, D] and the sizes of its model.
"""

import numpy as np

from hope_jax import SelfModifyingConfig, Tokens
from hope_jax.models import ModelConfig
from tests.oracles import (
    gelu,
    l2_unit,
    projected,
    self_modifying_loop,
    sigmoid,
    silu,
    softmax,
    softplus,
    titans_loop,
)


def rms(x, gain, groups=1):
    """RMSNorm of each group of channels."""
    cut = x.reshape(len(x), groups, -1)
    return (cut / np.sqrt(np.mean(cut**2, axis=-1, keepdims=True) + 1e-6)).reshape(x.shape) * gain


def turned(x, t, theta):
    """Pairs (i, i + K/2) of the last axis as complex numbers, turned by t theta^(-2i/K)."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * t * theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)


def attention(params, r, heads, window=None, theta=10_000.0, mask=None):
    """The last `window` tokens that are not masked, and persistent vectors; keys are looked up, not masked."""
    cut = lambda x: x.reshape(len(x), heads, x.shape[1] // heads)  # noqa: E731
    q, k, v = (cut(r @ params[f"w{n}"]) for n in "qkv")
    always = params.get("persistent_PD", np.zeros((0, r.shape[1])))
    always_k, always_v = cut(always @ params["wk"]), cut(always @ params["wv"])
    ys = []
    for t in range(len(r)):
        past = range(0 if window is None else max(0, t - window + 1), t + 1)
        past = [s for s in past if mask is None or mask[s]]
        y = []
        for h in range(heads):
            scores = [turned(q[t, h], t, theta) @ turned(k[s, h], s, theta) for s in past]
            scores = np.array([*scores, *(always_k[:, h] @ q[t, h])])
            y.append(softmax(scores / np.sqrt(q.shape[-1])) @ np.stack([*v[past, h], *always_v[:, h]]))
        ys.append(np.concatenate(y) @ params["wo"])
    return np.stack(ys)


def mixed(params, r, reads, heads):
    """What surrounds a sequence layer: a norm per head, a gate if there is one, a map out."""
    y = rms(reads, params["head_norm"]["scale"], heads)
    return (y * silu(r @ params["w_gate"]) if "w_gate" in params else y) @ params["w_out"]


def titans(params, r, chunk_size):
    """Heads of Titans' memory, MLPs without the residual, concatenated."""
    (q, k, v), gate = projected(params, r), {n: r @ p["w"] + p["b"] for n, p in params["gates"].items()}
    eta, alpha, mu = softplus(gate["eta"]), sigmoid(gate["log_alpha"]), sigmoid(gate["log_mu"])
    q, k, ys = l2_unit(q), l2_unit(k), []
    for h in range(q.shape[1]):
        start = {n: w[h] for n, w in params["start"]["level_0"].items()}
        xs = Tokens(k[:, h], v[:, h], q[:, h], eta=eta[:, h], alpha=alpha[:, h], mu=mu[:, h])
        ys.append(titans_loop(start, xs, chunk_size, residual=False)[0])
    return np.concatenate(ys, axis=1)


def mamba2(params, r):
    """arXiv:2405.21060 with queries and keys that all heads share: S <- exp(-e^a dt) S + dt k v^T, and v is added."""
    (q, k, v), gate = projected(params, r), params["gates"]
    step = softplus(r @ gate["eta"]["w"] + gate["eta"]["b"])
    kept, ys = np.exp(-np.exp(gate["rate"]["b"]) * step), []
    states = np.zeros((v.shape[1], k.shape[2], v.shape[2]))
    for t in range(len(r)):
        for h, s in enumerate(states):
            states[h] = kept[t, h] * s + step[t, h] * np.outer(k[t, 0], v[t, h])
        ys.append(np.concatenate([q[t, 0] @ s + d * x for s, d, x in zip(states, params["skip"], v[t], strict=True)]))
    return np.stack(ys)


def mix_attention(params, r, c: ModelConfig):
    return attention(params, r, c.heads)


def mix_window(params, r, c: ModelConfig):
    return attention(params, r, c.heads, c.window)


def mix_titans(params, r, c: ModelConfig):
    return mixed(params, r, titans(params["memory"], r, c.chunk_mem), c.heads)


def mix_mamba2(params, r, c: ModelConfig):
    return mixed(params, r, mamba2(params["memory"], r), c.heads)


def mix_self_modifying(params, r, c: ModelConfig):
    sizes = {n: getattr(c, n) for n in ("dim", "heads", "memory_hidden", "chunk_proj", "chunk_mem", "value_norm")}
    return mixed(params, r, self_modifying_loop(SelfModifyingConfig(**sizes), params["memory"], r), c.heads)


def mix_gated_by_memory(params, r, c: ModelConfig):
    """T-26 to T-28."""
    y = rms(mix_window(params["attention"], r, c), params["attention_norm"]["scale"])
    m = rms(mix_titans(params["recall"], r, c), params["recall_norm"]["scale"])
    return (silu(y) * m) @ params["w_out"]


def mix_memory_then_attention(params, r, c: ModelConfig):
    """T-29 to T-31."""
    m = mix_titans(params["recall"], r, c)
    return mix_window(params["attention"], rms(m, params["norm"]["scale"]), c)


def block(params, x, mix, c: ModelConfig):
    """A mixer over time, then the levels of a CMS or a SwiGLU, each over a norm and added to its input."""
    x = x + mix(params["mixer"], rms(x, params["mixer_norm"]["scale"]), c)
    if "mlp" in params:
        p = params["mlp"]
        r = rms(x, p["norm"]["scale"])
        return x + (silu(r @ p["w_gate"]) * (r @ p["w_up"])) @ p["w_down"]
    for i in range(len(params["cms"])):
        p = params["cms"][f"level_{i}"]
        x = x + gelu(rms(x, p["norm"]["scale"]) @ p["w2"]) @ p["w1"]
    return x
