"""The tile of the chunked form. It sets the speed and must not change the numbers."""


def default_block_t(tokens: int) -> int:
    """Tokens per tile for a call of `tokens` tokens."""
    return tokens if tokens <= 64 else 64
