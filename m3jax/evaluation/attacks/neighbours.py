"""The words that are nearest to a word in a model's own embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.evaluation.tasks.task import TaskError
from m3jax.models.tokenizer import Tokenizer

_SHORTEST = 3  # letters; shorter tokens are mostly parts of words
_COUNT = 8


class Neighbours:
    """Finds words of like meaning, by the cosine between rows of the embedding.

    Candidates are the tokens that are words: letters alone, three or more.
    """

    def __init__(self, embedding: jax.Array, tokenizer: Tokenizer):
        """Lists the words of the vocabulary.

        Args:
          embedding: (V, H), of the model.
          tokenizer: of the model.

        Raises:
          TaskError: the vocabulary has no words.
        """
        self._embedding, self._tokenizer = embedding, tokenizer
        self._words: dict[int, str] = {}
        for token in range(embedding.shape[0]):
            text = tokenizer.decode([token]).strip()
            if text.isalpha() and len(text) >= _SHORTEST:
                self._words[token] = text
        if not self._words:
            raise TaskError(
                "attack words: the tokenizer has no token that is a word, and so a "
                "word has no neighbours; leave this attack out"
            )

    def __call__(self, word: str) -> list[str]:
        """The nearest other words, nearest first, capitalised as the word is."""
        own = [token for token, text in self._words.items() if text == word]
        tokens = own or self._tokenizer.encode(word, add_special_tokens=False)
        if not tokens:
            return []
        near = np.asarray(_cosines(self._embedding, jnp.array(tokens, jnp.int32)))
        found: dict[str, str] = {}  # by what it is in lower case
        candidates = np.array(list(self._words))
        for i in np.argsort(-near[candidates], kind="stable"):
            text = self._words[int(candidates[i])]
            found.setdefault(text.casefold(), _capitalised(text, word))
            found.pop(word.casefold(), None)
            if len(found) == _COUNT:
                break
        return list(found.values())


@jax.jit
def _cosines(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Cosine of every row with the mean of some rows: (V, H), (n,) to (V,) float32."""
    mean = jnp.mean(embedding[tokens].astype(jnp.float32), axis=0)
    lengths = jnp.linalg.norm(embedding.astype(jnp.float32), axis=1)
    products = jnp.einsum(
        "vh,h->v",
        embedding,
        mean.astype(embedding.dtype),
        preferred_element_type=jnp.float32,
    )
    longest = lengths * jnp.linalg.norm(mean)
    return products / jnp.maximum(longest, np.finfo(np.float32).tiny)


def _capitalised(text: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return text.upper()
    return text.capitalize() if like[:1].isupper() else text.lower()
