"""An answer while it is made: which token comes next, and the text as soon as it is sure, up to one that ends it."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from hope_jax.training.errors import UserError
from hope_jax.training.generate import Decoding, choose_token
from hope_jax.training.vocabulary import Vocabulary


class Answer:
    """The text of an answer, piece by piece.

    Args:
      vocabulary: from tokens to text.
      until: the answer ends before this text; "" does not end it.
      before: the tokens that it follows (see `Decoding`).

    Example:
      >>> from hope_jax.training.vocabulary import load_vocabulary
      >>> answer = Answer(load_vocabulary("bytes"), until="\\n\\n")
      >>> [answer.add(token) for token in "é\\n!\\n\\n".encode()], answer.ended
      (['', 'é', '', '\\n!', '', ''], True)
    """

    def __init__(self, vocabulary: Vocabulary, until: str = "", before: Sequence[int] = ()):
        self.ended = False
        self._decoding, self._until = Decoding(vocabulary, before), until
        self._waiting = ""  # decoded and not yet shown

    def add(self, token: int) -> str:
        """What is sure of the text with one more token and was not before."""
        self._waiting += self._decoding.add(token)
        if self._until and self._until in self._waiting:
            self.ended = True
            return self._show(self._waiting.index(self._until))
        return self._show(len(self._waiting) - _overlap(self._waiting, self._until))

    def end(self) -> str:
        """The rest, where no more tokens come."""
        return "" if self.ended else self._waiting + self._decoding.end()

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The whole answer; no token is taken after its end."""
        for token in tokens:
            yield self.add(token)
            if self.ended:
                return
        yield self.end()

    def _show(self, count: int) -> str:
        shown, self._waiting = self._waiting[:count], self._waiting[count:]
        return shown


def check_options(max_tokens: int, temperature: float, top_k: int, *seeds: int) -> None:
    """Refuses an answer that cannot be made.

    Raises:
      UserError: a value out of range.
    """
    if max_tokens < 1 or not 0 <= temperature < math.inf or top_k < 0:
        raise UserError(
            "max_tokens must be at least 1, temperature a finite number and it and top_k at least 0; "
            f"got {max_tokens}, {temperature}, {top_k}"
        )
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"a seed is at least 0 and below 2**32; got {seed}")


@functools.lru_cache(maxsize=16)
def choices(greedy: bool, top_k: int) -> Callable[..., jax.Array]:
    """(temperature, logits_BV, seed_B, i, allowed_BV) -> the i-th token_B of answers, each by its own row alone."""

    def choose(temperature, logits_V, seed, i, allowed_V):
        key = jax.random.fold_in(jax.random.key(seed), i)
        heat = 0.0 if greedy else temperature
        return choose_token(logits_V, key, allowed_V=allowed_V, temperature=heat, top_k=top_k)

    return jax.jit(jax.vmap(choose, in_axes=(None, 0, 0, None, 0)))


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of the text may be the beginning of its end."""
    return next((n for n in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:n])), 0)
