"""One frozen description of a language model; every field is checked when it is made."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Literal

from .architectures import ARCHITECTURES, Architecture

NAMES = tuple(ARCHITECTURES)
if TYPE_CHECKING:
    type Name = str
else:
    Name = Literal[NAMES]  # so that a mistyped override is answered with the nearest
READS = ("start", "before")
MLP_RULES = ("input", "layerwise")
VARIANTS = ("moneta", "yaad", "memora")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "dots")
CMS_VARIANTS = ("sequential", "nested", "independent")
CMS_METAS = ("first_order", "outer")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of a language model; the defaults are the "tiny" column of spec 8.3.

    Attributes:
      name: the architecture, one of `NAMES`: "hope" (self-modifying Titans, then CMS), "transformer" (softmax
        attention, then SwiGLU) or another of `architectures.py`.
      vocab_size: number of tokens.
      dim: width D of the residual stream.
      layers: number of blocks.
      heads: heads of the mixer, attention or a memory each; must divide `dim` unless `head_dim` is given.
      memory_hidden: hidden width F of each MLP memory.
      chunk_proj: tokens per write of the boxes that make k, v and the gates; it divides `chunk_mem` or the
        reverse.
      chunk_mem: tokens per write of the main memory, of every architecture with a memory that is read or whose errors
        are taken at the chunk's start.
      read: "start" reads the weights of the chunk start, "before" the running ones (spec 7.3).
      momentum: decay of the write momentum, "gate" for one made from the token, None for no momentum.
      retention: writes forget by a gate alpha (False: alpha = 1).
      dgd_decay: writes erase along their own key (delta gradient descent; False: plain descent).
      exact: step size eta / (1 + eta |k|^2) rather than eta (spec 3.1).
      mlp_rule: "input" erases in the first matrix of a box only, "layerwise" in both (spec S7.6, S7.7).
      adaptive_q: queries come from a written box too.
      static: of "k" and "v": those made by ordinary projections instead of written boxes.
      erase_max: largest erase coefficient of delta-rule models; 2 gives transitions with eigenvalues down to -1.
      omega_window: tokens that each token of "omega" and "atlas" writes, itself and the last before it.
      miras: objective and retention of "miras": "moneta" (Lp, Lq), "yaad" (Huber, L2) or "memora" (L2, KL).
      conv_window: causal convolution after q, k, v; 0 = none.
      value_norm: values get unit length, as keys do. Without it the boxes, which regress values they make
        themselves, can feed on their own growth until they overflow (experiments/LOG.md).
      error_clip: norm beyond which a box's error counts linearly (Huber in the place of L2); None = never.
      eta_init: inner step size at the start of training.
      out_gate: gate the self-modifying output by silu(r @ w_gate).
      cms_hidden: hidden width of each CMS level, fast first.
      cms_chunks: chunk sizes in tokens of the FAST levels, which are the first `len(cms_chunks)` levels and
        adapt inside the sequence; () = every level is an ordinary parameter. Each size divides the next.
      cms_eta: step of the fast levels; a level of C tokens steps by `cms_eta / C` times its summed gradient.
      bptt_chunks: per fast level, after how many writes the outer gradient is cut; () or None = never.
      cms_variant: "sequential" (a chain), "nested" (a chain whose fast levels start again when the next slower fast
        one writes) or "independent" (all levels read the same input; a softmax of learned logits mixes them).
      cms_meta: of "nested": "first_order" moves the start states inside the sequence too, "outer" does not.
      mlp_chunks: of the transformer, one entry per layer: the chunk size in tokens of the fast level to which the
        layer's MLP belongs, None for an ordinary MLP; () = all ordinary. Steps are those of `cms_eta`.
      mlp_hidden: hidden width of the SwiGLU of architectures without CMS; None = 8/3 dim, to the next multiple of 8.
      kv_heads: heads of keys and values of attention, a divisor of `heads` (grouped queries); None = `heads`.
      head_dim: channels per head of attention; None = dim / heads.
      window: tokens a sliding-window attention sees, the current one included.
      persistent: learned vectors that Titans' attention sees beside its window.
      max_length: tokens the attention cache holds.
      rope_theta: base of the rotary wavelengths; None = attention knows no positions.
      rope_llama3: () or the four numbers of "llama3" scaling: factor, low and high frequency factors, and tokens of
        the contexts before scaling (see `rotary.stretched`).
      norm_eps: constant inside the norms of the residual stream.
      tie_embeddings: the head reuses the embedding.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and states stay float32.
      remat: "none", "full" (recompute each block in the backward pass) or "dots" (keep matrix products).

    Example:
      >>> ModelConfig(name="transformer", dim=96, heads=3).mlp_width
      256
    """

    name: Name = "hope"
    vocab_size: int = 256
    dim: int = 64
    layers: int = 2
    heads: int = 2
    memory_hidden: int = 32
    chunk_proj: int = 4
    chunk_mem: int = 4
    read: Literal["start", "before"] = "start"
    momentum: float | Literal["gate"] | None = 0.9
    retention: bool = True
    dgd_decay: bool = True
    exact: bool = True
    mlp_rule: Literal["input", "layerwise"] = "input"
    adaptive_q: bool = False
    static: tuple[str, ...] = ()
    erase_max: float = 1.0
    omega_window: int = 4
    miras: Literal["moneta", "yaad", "memora"] = "yaad"
    conv_window: int = 4
    value_norm: bool = True
    error_clip: float | None = None
    eta_init: float = 0.02
    out_gate: bool = True
    cms_hidden: tuple[int, ...] = (128, 128)
    cms_chunks: tuple[int, ...] = ()
    cms_eta: float = 0.1
    bptt_chunks: tuple[int | None, ...] = ()
    cms_variant: Literal["sequential", "nested", "independent"] = "sequential"
    cms_meta: Literal["first_order", "outer"] = "first_order"
    mlp_chunks: tuple[int | None, ...] = ()
    mlp_hidden: int | None = None
    window: int = 64
    persistent: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    max_length: int = 2048
    rope_theta: float | None = 10_000.0
    rope_llama3: tuple[float, ...] = ()
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self) -> None:
        for field in ("cms_hidden", "cms_chunks", "bptt_chunks", "mlp_chunks", "rope_llama3", "static"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # lists come from text files
        for field, choices in _CHOICES.items():
            _require(
                getattr(self, field) in choices,
                f"{field} must be one of {choices}; got {getattr(self, field)!r}",
            )
        _check_sizes(self)
        _check_memories(self)
        _check_fast_levels(self)

    @property
    def head_width(self) -> int:
        """Channels per head, K."""
        return self.head_dim if self.head_dim is not None else self.dim // self.heads

    @property
    def head_widths(self) -> tuple[int, int]:
        """Key and value width of one head, K and V."""
        return self.head_width, self.head_width

    @property
    def architecture(self) -> Architecture:
        """What the blocks are made of."""
        return ARCHITECTURES[self.name]

    @property
    def has_cms(self) -> bool:
        """Whether a block ends in a CMS chain."""
        return self.architecture.channel == "cms"

    @property
    def repeats(self) -> int:
        """Blocks, or groups of a hybrid's blocks, in the whole depth."""
        return self.layers // len(self.architecture.mixers)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the SwiGLU."""
        return self.mlp_hidden if self.mlp_hidden is not None else -(-8 * self.dim // 3 // 8) * 8

    @property
    def fast_chunks(self) -> tuple[int, ...]:
        """Chunk sizes of the levels that adapt inside the sequence, fastest first."""
        return self.cms_chunks or tuple(sorted({chunk for chunk in self.mlp_chunks if chunk is not None}))

    @property
    def branches(self) -> int:
        """Residual branches in the whole model."""
        return self.layers * (1 + len(self.cms_hidden) if self.has_cms else 2)

    @property
    def out_gain(self) -> float:
        """Output matrices of all branches start smaller, so that the residual stream keeps its scale."""
        return self.branches**-0.5


def check_sequence_length(config: ModelConfig, length: int) -> None:
    """Refuse a training sequence in which some fast level would never write (spec 6.4).

    Raises:
      ValueError: `length` ends before anything is read that the slowest fast level or memory wrote.
    """
    slowest = max(config.fast_chunks, default=0)
    _require(
        length > slowest,
        f"sequences of {length} tokens never read what the CMS level with chunk {slowest} writes; train on "
        f"{slowest + 1} tokens or more, shorten the chunks {config.fast_chunks}, or drop that one (an ordinary level)",
    )
    chunk = config.chunk_mem if config.architecture.chunked and config.read == "start" else 0
    if chunk and config.name in ("hope", "self_modifying_titans"):
        chunk = max(chunk, config.chunk_proj)
    _require(
        length > chunk,
        f"sequences of {length} tokens never read what a memory with chunk {chunk} writes; train on {chunk + 1} "
        f"tokens or more, or shorten chunk_proj and chunk_mem",
    )


_CHOICES = {
    "name": NAMES,
    "read": READS,
    "mlp_rule": MLP_RULES,
    "miras": VARIANTS,
    "dtype": DTYPES,
    "remat": REMATS,
    "cms_variant": CMS_VARIANTS,
    "cms_meta": CMS_METAS,
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_sizes(config: ModelConfig) -> None:
    for field in (
        "vocab_size",
        "dim",
        "layers",
        "heads",
        "memory_hidden",
        "chunk_proj",
        "chunk_mem",
        "window",
        "persistent",
        "omega_window",
        "max_length",
    ):
        _require_positive(field, getattr(config, field))
    for field in ("cms_hidden", "cms_chunks"):
        for value in getattr(config, field):
            _require_positive(f"each entry of {field}", value)
    if config.mlp_hidden is not None:
        _require_positive("mlp_hidden", config.mlp_hidden)
    _check_attention(config)
    _require(
        (config.head_dim is not None and config.name != "hope") or config.dim % config.heads == 0,
        f"heads must divide dim; got dim={config.dim}, heads={config.heads}",
    )
    _require(
        not config.architecture.rotary or config.rope_theta is None or config.head_width % 2 == 0,
        f"rotary positions need an even head width; got {config.head_width} from dim={config.dim}, "
        f"heads={config.heads}",
    )
    _require(
        not config.has_cms or len(config.cms_hidden) > 0,
        "cms_hidden needs at least one width; got (), for example cms_hidden=(128,)",
    )
    mixers = len(config.architecture.mixers)
    _require(
        config.layers % mixers == 0,
        f"{config.name} alternates {mixers} mixers, so layers must be a multiple of {mixers}; got {config.layers}",
    )
    _require(
        config.rope_theta is None or config.rope_theta > 0,
        f"rope_theta must be positive, or None for no positions; got {config.rope_theta}",
    )


def _check_attention(config: ModelConfig) -> None:
    if config.head_dim is not None:
        _require_positive("head_dim", config.head_dim)
    if config.kv_heads is not None:
        _require_positive("kv_heads", config.kv_heads)
        _require(
            config.heads % config.kv_heads == 0,
            f"kv_heads must divide heads; got kv_heads={config.kv_heads}, heads={config.heads}",
        )
    scaling = config.rope_llama3
    _require(
        len(scaling) in (0, 4) and all(value > 0 for value in scaling) and (not scaling or scaling[1] < scaling[2]),
        f"rope_llama3 needs factor, low < high frequency factors and a length, all positive, or (); got {scaling}",
    )
    _require(config.norm_eps > 0, f"norm_eps must be positive; got {config.norm_eps}")


def _check_memories(config: ModelConfig) -> None:
    momentum = config.momentum
    _require(
        momentum is None or momentum == "gate" or (_is_number(momentum) and 0 <= momentum < 1),
        f"momentum must be None, 'gate' or a number in [0, 1); got {momentum!r}",
    )
    _require(
        isinstance(config.conv_window, int) and config.conv_window >= 0,
        f"conv_window must be 0 (none) or a number of tokens; got {config.conv_window!r}",
    )
    clip = config.error_clip
    _require(
        clip is None or (_is_number(clip) and clip > 0), f"error_clip must be None or a positive number; got {clip!r}"
    )
    _require(config.eta_init > 0, f"eta_init must be positive; got {config.eta_init}")
    _require(0 < config.erase_max <= 2, f"erase_max must lie in (0, 2]; got {config.erase_max}")
    _require(set(config.static) <= {"k", "v"}, f"static holds some of 'k' and 'v'; got {config.static}")
    fast, slow = sorted((config.chunk_proj, config.chunk_mem))
    _require(
        slow % fast == 0,
        f"one of chunk_proj, chunk_mem must divide the other; got {config.chunk_proj} and {config.chunk_mem}",
    )


def _check_fast_levels(config: ModelConfig) -> None:
    chunks = config.cms_chunks
    _require(
        not chunks or config.has_cms,
        f"{config.name} has no CMS levels; leave cms_chunks empty (got {chunks}) or use 'hope' or 'hope_attention'",
    )
    _require(
        len(chunks) <= len(config.cms_hidden),
        f"cms_chunks {chunks} has more entries than cms_hidden {config.cms_hidden}; give each level a width",
    )
    _check_mlp_chunks(config)
    fast_chunks = config.fast_chunks
    _require(
        all(slow % fast == 0 for fast, slow in itertools.pairwise(fast_chunks)),
        f"chunk sizes must divide, fastest first; got {'cms' if chunks else 'mlp'}_chunks={list(fast_chunks)}",
    )
    _require(
        config.cms_variant != "nested" or len(fast_chunks) >= 2 or not config.has_cms,
        f"cms_variant='nested' needs two fast levels, or nothing starts again; got chunk sizes {fast_chunks}",
    )
    _require(config.cms_eta >= 0, f"cms_eta must not be negative; got {config.cms_eta}")
    _require(
        len(config.bptt_chunks) <= len(fast_chunks),
        f"bptt_chunks {config.bptt_chunks} has more entries than there are fast levels, of chunk sizes {fast_chunks}",
    )
    for value in config.bptt_chunks:
        if value is not None:
            _require_positive("each entry of bptt_chunks that is not None", value)


def _check_mlp_chunks(config: ModelConfig) -> None:
    chunks = config.mlp_chunks
    _require(
        not chunks or config.name == "transformer",
        f"mlp_chunks assigns the MLPs of a transformer to levels, name={config.name!r} has cms_chunks; got {chunks}",
    )
    _require(
        len(chunks) in (0, config.layers),
        f"mlp_chunks needs one entry per layer, None for an ordinary MLP; got {chunks} for {config.layers} layers",
    )
    for chunk in chunks:
        if chunk is not None:
            _require_positive("each entry of mlp_chunks that is not None", chunk)


def _require_positive(field: str, value: object) -> None:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{field} must be a positive integer; got {value!r}",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
