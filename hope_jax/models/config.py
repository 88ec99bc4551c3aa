"""One frozen description of a language model; every field is checked when it is made (`config_checks.py`)."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from .architectures import ARCHITECTURES, Architecture
from .config_checks import check, require

NAMES = tuple(ARCHITECTURES)
if TYPE_CHECKING:
    type Name = str
else:
    Name = Literal[NAMES]  # so that a mistyped override is answered with the nearest


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
      memory: of self-modifying Titans: "mlp" (89), or "linear", a matrix per box (93), whose transitions reach
        eigenvalues of -1 at chunk 1.
      memory_hidden: hidden width F of each MLP memory.
      chunk_proj: tokens per write of the boxes that make k, v and the gates; it divides `chunk_mem` or the
        reverse.
      chunk_mem: tokens per write of the main memory, of every architecture with a memory that is read or whose errors
        are taken at the chunk's start.
      read: "start" reads the weights of the chunk start, "before" the running ones (spec 7.3).
      stage: of self-modifying Titans: 1 writes the main memory alone, 2 teaches every box the value v, 3 each the value
        that it makes itself of v (spec 7.1).
      objective: of self-modifying Titans' boxes: "l2" (93), or "dot_product" (92), which makes matrix boxes gated delta
        rules, and without `dgd_decay` and `retention` sums of what they are told.
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
      error_clip: norm to which longer errors of a box are cut (with "l2" that is Huber's loss); None = never.
      surprise: of self-modifying Titans: only tokens whose error is at least so many times the average over earlier
        chunks are written (spec 7.8); None = all.
      surprise_temperature: above 0 the gate is a sigmoid of this width, which has a gradient.
      gate_retention: a token that is not written makes nothing forget either.
      eta_init: inner step size at the start of training.
      out_gate: gate the self-modifying output by silu(r @ w_gate).
      cms_hidden: hidden width of each CMS level, fast first; () = no CMS, blocks of a mixer alone.
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
    memory: Literal["mlp", "linear"] = "mlp"
    memory_hidden: int = 32
    chunk_proj: int = 4
    chunk_mem: int = 4
    read: Literal["start", "before"] = "start"
    stage: Literal[1, 2, 3] = 3
    objective: Literal["l2", "dot_product"] = "l2"
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
    surprise: float | None = None
    surprise_temperature: float = 0.0
    gate_retention: bool = False
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
        check(self)

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
    def adapts(self) -> bool:
        """Whether any level learns inside the sequence; one whose step is 0 is an ordinary MLP."""
        return bool(self.fast_chunks) and self.cms_eta != 0

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
    require(
        length > slowest,
        f"sequences of {length} tokens never read what the CMS level with chunk {slowest} writes; train on "
        f"{slowest + 1} tokens or more, shorten the chunks {config.fast_chunks}, or drop that one (an ordinary level)",
    )
    running = config.architecture.running_read and config.read == "before"
    chunk = config.chunk_mem if config.architecture.chunked and not running else 0
    if chunk and config.architecture.projections:
        chunk = max(chunk, config.chunk_proj)
    require(
        length > chunk,
        f"sequences of {length} tokens never read what a memory with chunk {chunk} writes; train on {chunk + 1} "
        f"tokens or more, or shorten chunk_proj and chunk_mem",
    )
