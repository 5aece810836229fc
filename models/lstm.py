"""Recurrent language models over bytes: LSTM (Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735) and GRU
(Cho et al. 2014, arXiv:1406.1078), as an nnx module. Time is a `lax.scan`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Cell = Literal["lstm", "gru"]
_CELLS: dict[str, type] = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}


class RecurrentLM(nnx.Module):
    """Embedding, recurrent layers, logits of the next token.

    Args:
      width: features of the embedding and of every layer.
      depth: number of recurrent layers.
      vocabulary: number of tokens; 256 for bytes.
      cell: "lstm" or "gru".
      rngs: where the weights' randomness comes from.

    Calling it maps tokens `int32[n, s]` to logits `float32[n, s, vocabulary]`; those at t are for token t + 1, and
    depend on the tokens up to t.

    Raises:
      ValueError: no such cell.
    """

    def __init__(self, width: int = 256, depth: int = 1, *, vocabulary: int = 256, cell: Cell = "lstm", rngs: nnx.Rngs):
        if cell not in _CELLS:
            raise ValueError(f"cell must be one of {', '.join(_CELLS)}, got {cell!r}")
        self.width, self.cell = width, cell
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        # Without `rngs=False` every layer would keep a random key, though none draws.
        self.layers = nnx.List(
            [nnx.RNN(_CELLS[cell](width, width, rngs=rngs), return_carry=True, rngs=False) for _ in range(depth)]
        )
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def initial_state(self, n: int) -> list[Any]:
        """The state before the first token: for each layer `float32[n, width]`, of an LSTM a pair (c, h) of them."""
        zeros = jnp.zeros((n, self.width), jnp.float32)
        return [(zeros, zeros) if self.cell == "lstm" else zeros for _ in self.layers]

    def step(self, tokens: jax.Array, state: list[Any]) -> tuple[jax.Array, list[Any]]:
        """Reads on where `state` stands, one token or many.

        Args:
          tokens: `int32[n, s]`.
          state: of `initial_state`, or of an earlier step.

        Returns:
          Logits `float32[n, s, vocabulary]`, and the state after the last token.
        """
        x = self.embedding(tokens)
        states = []
        for layer, carry in zip(self.layers, state, strict=True):
            carry, x = layer(x, initial_carry=carry)
            states.append(carry)
        return self.head(x), states

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.step(tokens, self.initial_state(tokens.shape[0]))[0]
