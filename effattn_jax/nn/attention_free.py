"""Attention-free mixers: a function of `mixing.MIXERS` with its weights as parameters.

y = f(x, weights), or with a gated projection before it and a projection behind: y = f(a * sigmoid(b)) W_out, (a, b) = x W_in
"""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax import mixing
from effattn_jax.nn.mixer import SequenceMixer, check_inputs


class AttentionFree(SequenceMixer):
    """A function of `mixing.MIXERS` on the residual stream, (B, T, D) -> (B, T, D).

    Its weights are parameters, float32 in the sums whatever the activations are. Where they have a place for each step, `max_length` says how
    many there are. kv_heads, positions, window, chunk size and use_bias do not apply; heads are the groups of channels that share a kernel.

    Attributes:
      kernel: a name of `mixing.MIXERS`.
      options: fixed options of the function, such as {"orthonormal": True}; None for none.
      projections: whether a projection with a gate (GLU) stands before the function, and one behind it.
      The others: see `SequenceMixer`.

    Raises:
      ValueError: an unknown kernel, causal=True where there is no causal form, a missing max_length, heads that do not divide the width,
        and what the function raises.

    Cost and state: the function's.

    >>> import jax, jax.numpy as jnp
    >>> mixer = AttentionFree(8, kernel="gmlp", max_length=16)
    >>> jax.jit(mixer.init_with_output)(jax.random.key(0), jnp.ones((1, 3, 8)))[0].shape
    (1, 3, 8)
    """

    kernel: str = "mlp_mixer"
    options: Mapping[str, Any] | None = None
    projections: bool = False

    @nn.compact
    def __call__(self, x_BxTxD, *, mask=None, segment_ids=None, positions=None, state=None, return_state=False):
        """See `SequenceMixer`."""
        check_inputs(x_BxTxD, self.width, mask, segment_ids)
        self._check_state(state, return_state)
        x = x_BxTxD.astype(self.dtype)
        if self.projections:
            x = nn.glu(self._dense(2 * self.width, "in")(x))
        options = {} if not self.causal else {"initial_state": state, "return_state": return_state}
        out = self._call(x, self._weights(), mask=mask, segment_ids=segment_ids, **options)
        y, state = out if return_state else (out, None)
        if self.projections:
            y = self._dense(self.width, "out", self.output_scale)(y)
        return (y, state) if return_state else y

    def _call(self, x, weights, **options):
        return self._line.function(x, **weights, is_causal=self.causal, **(self.options or {}), **options)

    def _weights(self):
        shapes, tree = jax.tree.flatten_with_path(self._shapes())
        names = [jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in shapes]

        def make(rng, index):
            return jax.tree.leaves(self._make(rng))[index].astype(self.param_dtype)

        return tree.unflatten([self.param(name, make, index) for index, name in enumerate(names)])

    def _make(self, rng):
        weights = self._line.weights(rng, self.width, self._length, self.heads)
        name = "" if self.projections else self._line.output
        return weights | ({name: self.output_scale * weights[name]} if name else {})

    def _shapes(self):
        return jax.eval_shape(lambda: self._make(jax.random.key(0)))

    @property
    def _line(self):
        if self.kernel not in mixing.MIXERS:
            raise ValueError(f"kernel must be among {tuple(mixing.MIXERS)}; got {self.kernel!r}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width; got width={self.width}, heads={self.heads}")
        return mixing.MIXERS[self.kernel]

    @property
    def _length(self):
        if self.fixes_length() and self.max_length is None:
            raise ValueError(f"max_length must be given: the weights of {self.kernel!r} have a place for each step")
        return self.max_length or 0

    @nn.nowrap
    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> Any:
        """The function's state before the first token; with places it has room for max_length tokens, whatever the capacity.

        Raises:
          ValueError: a capacity beyond max_length where the weights fix the length.
        """
        if self.fixes_length() and capacity > self._length:
            raise ValueError(f"capacity must be at most max_length={self.max_length}; got {capacity}")
        weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes())
        x = jnp.zeros((batch, 0, self.width), dtype or self.dtype)
        return self._call(x, weights, return_state=True)[1]

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """The function's on `context` tokens, and 6 D^2 for the projections."""
        projections = 6 * self.width**2 if self.projections else 0
        return projections + self._line.flops(self.width, context, self.heads)

    @nn.nowrap
    def own_options(self) -> dict[str, str]:
        """See `SequenceMixer`: settings of the function."""
        parameters = inspect.signature(self._line.function).parameters.values()
        plain = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and isinstance(p.default, bool | int | float)]
        return dict.fromkeys(set(plain) - {"is_causal", "return_state"}, "kernel")

    @nn.nowrap
    def fixes_length(self) -> bool:
        """Whether the weights have a place for each step."""
        return self._line.fixes_length

    @nn.nowrap
    def accepts_causal(self) -> bool:
        """Whether the function has a causal form."""
        return "return_state" in inspect.signature(self._line.function).parameters
