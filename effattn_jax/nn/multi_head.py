"""One multi-head module for every kernel of `attention.MIXERS`.

q, k, v = x W_q, x W_k, x W_v, turned by position where asked;   y = kernel(q, k, v, gates(x)) W_out
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import attention
from effattn_jax.nn.mixer import SequenceMixer, check_inputs
from effattn_jax.position import rotary

DECAY_RANK = 16
DECAY_TEMPERATURE = 16.0


class MultiHeadAttention(SequenceMixer):
    """Projections and heads around a kernel of `attention.MIXERS`, (B, T, D) -> (B, T, D).

    y = kernel(q, k, v, ...) W_out with q (B, T, N, H), k and v (B, T, K, H), H = D / N.

    Rotary positions turn q and k before the kernel. Softmax scores then depend on distances only, and so do those of a
    kernel without feature map (gated_linear); through a feature map they are features of both positions.

    Attributes:
      kernel: a name of `attention.MIXERS`.
      options: fixed options of the kernel; such as {"feature_map": "relu"}; None for none.
      gates: further inputs of the kernel made from x, by argument name; "log_decay": log(sigmoid(x W_1 W_2)) / 16 for
        each feature of a head (GLA, arXiv 2312.06635).
      head_norm: whether each head's output is divided by its root mean square, for kernels without a normaliser.
      output_gate: whether the output is multiplied by silu(x W_gate) before W_out.
      frozen: weights of the kernel that are constants, drawn from `seed` and never trained, such as ("projection",).
      seed: of the frozen weights, which all modules of one seed and size share; they are in no checkpoint, being a function of both.
      The others: see `SequenceMixer`.

    Raises:
      ValueError: heads that do not divide the width or the key heads, a window that the kernel does not take, rotary
        positions missing on a resumed call, an unknown kernel or gate.

    Inputs of the kernel without a time axis (`weights` in its table line) are parameters, in float32, unless frozen.

    Cost and state: the kernel's.

    >>> import jax, jax.numpy as jnp
    >>> mixer = MultiHeadAttention(8, heads=2, kv_heads=1, kernel="softmax")
    >>> mixer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))[0].shape
    (1, 3, 8)
    """

    kernel: str = "softmax"
    options: Mapping[str, Any] | None = None
    gates: tuple[str, ...] = ()
    head_norm: bool = False
    output_gate: bool = False
    frozen: tuple[str, ...] = ()
    seed: int = 0

    @nn.compact
    def __call__(self, x_BxTxD, *, mask=None, segment_ids=None, positions=None, state=None, return_state=False):
        """See `SequenceMixer`."""
        check_inputs(x_BxTxD, self.width, mask, segment_ids)
        self._check_state(state, return_state)
        inputs = {"query": self._heads(x_BxTxD, "query", self.heads), "key": self._heads(x_BxTxD, "key", self.kv_heads)}
        if self.rotary_base is not None:
            positions = self._positions(x_BxTxD, positions, state)
            inputs = {name: rotary(value, positions, base=self.rotary_base) for name, value in inputs.items()}
        inputs["value"] = self._heads(x_BxTxD, "value", self.kv_heads)
        inputs.update({name: self._gate(x_BxTxD, name, mask) for name in self.gates})
        inputs.update(self._weights())
        out = self._kernel(inputs, mask, segment_ids, initial_state=state, return_state=return_state)
        out_BxTxNxH, state = out if return_state else (out, None)
        y_BxTxD = self._output(x_BxTxD, out_BxTxNxH)
        return (y_BxTxD, state) if return_state else y_BxTxD

    def _heads(self, x_BxTxD, name, heads):
        return self._dense(heads * self._head_dim, name)(x_BxTxD).reshape(*x_BxTxD.shape[:2], heads, self._head_dim)

    def _positions(self, x_BxTxD, positions, state):
        if positions is None and state is not None:
            raise ValueError(
                "positions must be given on a call with a state when rotary_base is set: "
                "the state does not count tokens"
            )
        return jnp.arange(x_BxTxD.shape[1])[None] if positions is None else positions

    def _gate(self, x_BxTxD, name, mask):
        if name != "log_decay":
            raise ValueError(f"gates must be among ('log_decay',); got {name!r}")
        # GLA's low-rank gate; the second factor has a bias, so a token's decay can start from any value.
        low = self._dense(DECAY_RANK, f"{name}_in", use_bias=False)(x_BxTxD)
        logits = self._dense(self.heads * self._head_dim, f"{name}_out", use_bias=True)(low)
        logits = logits.reshape(*x_BxTxD.shape[:2], self.heads, self._head_dim)
        gate = nn.log_sigmoid(logits.astype(jnp.promote_types(logits.dtype, jnp.float32))) / DECAY_TEMPERATURE
        return gate if mask is None else jnp.where(mask[..., None, None], gate, 0)  # padding does not age the state

    def _weights(self):
        make = _line(self.kernel).weights
        if make is None:
            return {}
        sizes = (self.heads, self.kv_heads, self._head_dim)
        names = set(_weight_shapes(self.kernel, *sizes)) - set(self.frozen)
        drawn = _drawn(self.kernel, self.seed, *sizes) if self.frozen else {}
        fixed = {name: jnp.asarray(drawn[name]) for name in self.frozen}
        return fixed | {
            name: self.param(name, lambda rng, name=name: make(rng, *sizes)[name]) for name in sorted(names)
        }

    def _kernel(self, inputs, mask, segment_ids, **options):
        for name in ("window", "chunk_size"):
            if getattr(self, name) is not None and name in _arguments(self.kernel):
                options[name] = getattr(self, name)
        if self.window is not None and "window" not in options:
            raise ValueError(f"window must be None: the kernel {self.kernel!r} has no window; got {self.window}")
        key_mask = None if mask is None else mask[:, None, None, :]
        kernel = _line(self.kernel).function
        options = {**(self.options or {}), **options}
        return kernel(**inputs, mask=key_mask, segment_ids=segment_ids, is_causal=self.causal, **options)

    def _output(self, x_BxTxD, out_BxTxNxH):
        if self.head_norm:
            out_BxTxNxH = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="head_norm")(out_BxTxNxH)
        out_BxTxD = out_BxTxNxH.reshape(*x_BxTxD.shape[:2], self.heads * self._head_dim).astype(self.dtype)
        if self.output_gate:
            out_BxTxD *= nn.silu(self._dense(self.heads * self._head_dim, "gate")(x_BxTxD))
        return self._dense(self.width, "out", self.output_scale)(out_BxTxD)

    @property
    def _head_dim(self):
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads must divide width and kv_heads must divide heads; got width={self.width}, heads={self.heads}, "
                f"kv_heads={self.kv_heads}"
            )
        return self.width // self.heads

    @nn.nowrap
    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> Any:
        """The kernel's empty state; caches are of `dtype`, by default the module's."""
        dim = self._head_dim
        return _line(self.kernel).empty_state(batch, capacity, self.heads, self.kv_heads, dim, dim, dtype or self.dtype)

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """Projections, and 4 H for each visible key (pairwise kernels) or 4 H M for a state of M features (others), a head.

        A causal pairwise kernel is counted over all `context` keys, as is usual for model FLOPs utilisation; a window
        limits them.
        """
        inner, key_inner = self.heads * self._head_dim, self.kv_heads * self._head_dim
        projections = 2 * self.width * (inner * (3 if self.output_gate else 2) + 2 * key_inner)
        gates = len(self.gates) * 2 * DECAY_RANK * (self.width + inner)
        seen, features = self._head_dim, 0
        if "projection" in (shapes := _weight_shapes(self.kernel, self.heads, self.kv_heads, self._head_dim)):
            seen = shapes["projection"].shape[0]
            features = 2 * seen * (inner + key_inner)
        if _line(self.kernel).pairwise:
            reach = context if self.window is None else self.window * (1 if self.causal else 2) + 1
            seen = min(context, reach)
        passes = 2 if self.gates and not self.causal else 1  # decays make the bidirectional form two passes
        return projections + gates + features + passes * 4 * inner * seen

    @nn.nowrap
    def accepts_window(self) -> bool:
        """Whether the kernel takes `window=`."""
        return "window" in _arguments(self.kernel)


def _line(kernel: str):
    if kernel not in attention.MIXERS:
        raise ValueError(f"kernel must be among {tuple(attention.MIXERS)}; got {kernel!r}")
    return attention.MIXERS[kernel]


def _weight_shapes(kernel: str, *sizes: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    make = _line(kernel).weights
    return {} if make is None else jax.eval_shape(lambda: make(jax.random.key(0), *sizes))


@functools.cache
def _drawn(kernel: str, seed: int, *sizes: int) -> Mapping[str, np.ndarray]:
    """The weights of a kernel as constants: drawn once, while the caller is being traced too."""
    with jax.ensure_compile_time_eval():
        return {name: np.asarray(x) for name, x in _line(kernel).weights(jax.random.key(seed), *sizes).items()}


def _arguments(kernel: str) -> frozenset[str]:
    return frozenset(inspect.signature(_line(kernel).function).parameters)
