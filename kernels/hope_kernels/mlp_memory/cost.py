"""Operations and bytes of a call of the MLP memory: what the chunked form must do on any machine.

Counted are the products of the README of this folder, a multiply-add as two operations, per token and head, for keys of
width K, F hidden units and chunks of C tokens (elementwise work is not counted):

| | K F | C (K + F) | C^2 |
|---|---|---|---|
| errors: k w2, h w1, d w1^T | 6 | | |
| reads at the chunk's start: q w2, h w1 | 4 | | |
| writes: a product of keys and writes for each matrix | 4 | | |
| momentum adds: the same for Z; R Omega for each matrix | 4 | | 4 |
| erasure adds, for the first matrix: K S, T X, T; K K^T | 2 | 2 | 2/3 |
| with momentum: K Z, P U | 2 | 2 F only | |

The gradient computes a chunk again and has two products for each one: three times the forward pass. The bytes that pass
between chip and memory at least once are the arrays of tokens in their own dtype, the gates, the weights and momenta at
both ends and, when gradients follow, those before every group of chunks, written once and read once.
"""

from hope_kernels.measuring import Cost, Mode
from hope_kernels.mlp_memory.arg_specs import ArgSpec
from hope_kernels.mlp_memory.xla import default_group


def cost(spec: ArgSpec, mode: Mode, block_t: int | None = None) -> Cost:
    """The counts for the whole call; `block_t` is the tokens between two states that are kept."""
    tokens = spec.batch * spec.tokens
    kept = block_t or spec.chunk_size * default_group(-(-spec.tokens // spec.chunk_size))
    flops, size = _flops(spec), _bytes(spec, arrays=4, gates=1)
    if mode != "forward":
        flops += 3 * flops
        size += _bytes(spec, arrays=7, gates=2) + 2 * _state_bytes(spec) / kept
    return Cost(tokens, tokens * spec.heads, tokens * spec.heads * flops, tokens * spec.heads * size, spec.dtype)


def _flops(spec: ArgSpec) -> float:
    """Forward, per token and head."""
    outer, chunk = spec.width * spec.hidden, min(spec.chunk_size, spec.tokens)
    flops = 14 * outer
    if spec.momentum:
        flops += 4 * outer + 4 * chunk**2
    if spec.erase:
        flops += 2 * outer + 2 * chunk * (spec.width + spec.hidden) + 2 / 3 * chunk**2
    if spec.erase and spec.momentum:
        flops += 2 * outer + 2 * chunk * spec.hidden
    return flops


def _bytes(spec: ArgSpec, arrays: int, gates: int) -> float:
    """`arrays` of tokens and `gates` times the gates, per token and head, and the state in and out."""
    item = {"bfloat16": 2, "float32": 4, "float64": 8}[spec.dtype]
    present = 1 + spec.decay + spec.momentum
    return item * arrays * spec.width + _wide(spec) * gates * present + 2 * _state_bytes(spec) / spec.tokens


def _state_bytes(spec: ArgSpec) -> int:
    """Both matrices, and their momenta where there are any."""
    return _wide(spec) * 2 * spec.width * spec.hidden * (2 if spec.momentum else 1)


def _wide(spec: ArgSpec) -> int:
    return 8 if spec.dtype == "float64" else 4
