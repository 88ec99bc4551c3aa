"""Operations and bytes of a call of the delta rule: what the chunked form must do on any machine.

Counted are the products of the README of this folder, a multiply-add as two operations, per token and value head, in
tiles of C tokens (elementwise work is not counted, the triangular system as its exact solve):

| | K V | C K, shared by the heads of a key head | C V | C^2 |
|---|---|---|---|---|
| forward | 6: K S, Q S, K^T W | 4: K K^T, Q K^T | 4: T X, P W | 2/3: T |
| without erase | 4: Q S, K^T W | 2: Q K^T | 2: P W | |
| momentum adds | 6: K Z, Q Z, K^T U | | 4: U to the system, U to the reads | 2: P |
| the same, without erase | 4 | | | 2 |
| gradients | 14: 7 products | 10: 5 | 10: 5 | |
| without erase | 8 | 6 | 4 | |
| momentum adds | twice what it adds forward | | | |

and the bytes that have to pass between chip and memory at least once: the arrays of tokens in their own dtype, the
gates in the dtype of the state, the states at both ends and, when gradients follow, the state at the start of each
tile and the inverse of its system, written once and read once.
"""

from hope_kernels.delta_rule.arg_specs import ArgSpec
from hope_kernels.measuring import Cost, Mode

TILE = 64


def cost(spec: ArgSpec, mode: Mode, block_t: int | None = None) -> Cost:
    """The counts for the whole call, in tiles of `block_t` (None: 64) tokens, fewer if the call has fewer."""
    tile = min(block_t or TILE, spec.tokens)
    if mode == "forward":
        return kernel_cost(spec, "forward", tile)
    passes = kernel_cost(spec, "forward_kept", tile), kernel_cost(spec, "gradients", tile)
    return passes[0]._replace(flops=sum(c.flops for c in passes), bytes=sum(c.bytes for c in passes))


def kernel_cost(spec: ArgSpec, kernel: str, tile: int) -> Cost:
    """The counts of one pass: "forward", "forward_kept" (it writes what the gradients need) or "gradients"."""
    tokens = spec.batch * spec.tokens
    if kernel == "gradients":
        flops, size = _gradient_flops(spec, tile), _gradient_bytes(spec)
    else:
        flops, size = _forward_flops(spec, tile), _forward_bytes(spec)
    if kernel != "forward":
        size += _kept_bytes(spec, tile)
    return Cost(tokens, tokens * spec.heads, tokens * spec.heads * flops, tokens * spec.heads * size, spec.dtype)


def _group(spec: ArgSpec) -> float:
    """Value heads per key head."""
    return spec.heads / (spec.key_heads or spec.heads)


def _forward_flops(spec: ArgSpec, tile: int) -> float:
    """Per token and value head."""
    outer, keys, values = _products(spec, tile)
    flops = 6 * outer + 4 * keys + 4 * values + 2 / 3 * tile**2 if spec.erase else 4 * outer + 2 * keys + 2 * values
    if spec.momentum:
        flops += _momentum_flops(spec, tile)
    return flops


def _gradient_flops(spec: ArgSpec, tile: int) -> float:
    outer, keys, values = _products(spec, tile)
    flops = 14 * outer + 10 * keys + 10 * values if spec.erase else 8 * outer + 6 * keys + 4 * values
    if spec.momentum:
        flops += 2 * _momentum_flops(spec, tile)
    return flops


def _momentum_flops(spec: ArgSpec, tile: int) -> float:
    outer, _, values = _products(spec, tile)
    return 6 * outer + 4 * values + 2 * tile**2 if spec.erase else 4 * outer + 2 * tile**2


def _products(spec: ArgSpec, tile: int) -> tuple[int, float, int]:
    """K V, C K per value head, and C V."""
    return spec.key_width * spec.value_width, tile * spec.key_width / _group(spec), tile * spec.value_width


def _item_bytes(spec: ArgSpec) -> tuple[int, int]:
    """Bytes of a number of the inputs, and of the state."""
    return {"bfloat16": 2, "float32": 4, "float64": 8}[spec.dtype], 8 if spec.dtype == "float64" else 4


def _gates(spec: ArgSpec) -> int:
    return spec.erase + spec.decay + spec.momentum


def _states(spec: ArgSpec) -> int:
    """Numbers in the state, and in the momentum where there is one."""
    return spec.key_width * spec.value_width * (2 if spec.momentum else 1)


def _forward_bytes(spec: ArgSpec) -> float:
    """q, k, u in; y out; gates in; the state in and out."""
    item, wide = _item_bytes(spec)
    tokens = item * (2 * spec.key_width / _group(spec) + 2 * spec.value_width) + wide * _gates(spec)
    return tokens + 2 * wide * _states(spec) / spec.tokens


def _gradient_bytes(spec: ArgSpec) -> float:
    """q, k, u, dy in; dq, dk, du out; gates in and their gradients out; the state's cotangent in and out."""
    item, wide = _item_bytes(spec)
    tokens = item * (4 * spec.key_width / _group(spec) + 3 * spec.value_width) + 2 * wide * _gates(spec)
    return tokens + 2 * wide * _states(spec) / spec.tokens


def _kept_bytes(spec: ArgSpec, tile: int) -> float:
    """The inverse in the input dtype, and the states at the starts of the tiles."""
    item, wide = _item_bytes(spec)
    return item * tile * spec.erase + wide * _states(spec) / tile
