"""The tile of the chunked form. It sets the speed and must not change the numbers."""

LARGEST = 64
MULTIPLE = 16


def default_block_t(tokens: int) -> int:
    """Tokens per tile for a call of `tokens` tokens: one tile up to 64, then equal tiles with little padding."""
    tiles = -(-tokens // LARGEST)
    if tiles <= 1:
        return max(tokens, 1)
    return -(-tokens // (tiles * MULTIPLE)) * MULTIPLE
