"""One multi-head module for every kernel of `attention.MIXERS` and `position.MIXERS`.

q, k, v = x W_q, x W_k, x W_v, turned by position where asked;   y = kernel(q, k, v, gates(x)) W_out
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax._places import count_positions
from effattn_jax._products import row_products, scaled_rows
from effattn_jax.nn import kernels
from effattn_jax.nn.mixer import SequenceMixer, check_inputs
from effattn_jax.nn.placing import Placing
from effattn_jax.position import rotary, xpos_decay
from effattn_jax.position.angles import signed

DECAY_RANK = 16
DECAY_TEMPERATURE = 16.0


class MultiHeadAttention(SequenceMixer):
    """Projections and heads around a kernel of `attention.MIXERS` or `position.MIXERS`, (B, T, D) -> (B, T, D).

    y = kernel(q, k, v, ...) W_out with q (B, T, N, H), k and v (B, T, K, H), H = D / N.

    Rotary positions turn q and k before the kernel: scores then depend on distances only, and so do features whose products are functions of
    q . k and of lengths ("cosine", "taylor", Performer's in the mean). Features of other maps ("elu", "relu", "dpfp", "hedgehog") are turned
    themselves, in the numerator alone (`position.rotary_linear_attention`). Of "exp", efficient attention and Linformer neither is true: there turned
    q and k say where a token stands, not how far off another is. A decay for each feature (GLA) commutes with turns where both features of a pair
    have the same: there it is the mean of the two. Kernels of `position.MIXERS` have positions of their own, and no others besides.

    Attributes:
      kernel: a name of `attention.MIXERS` or `position.MIXERS`.
      options: fixed options of the kernel; such as {"feature_map": "relu"}; None for none.
      gates: further inputs of the kernel made from x, by argument name; "log_decay": log(sigmoid(x W_1 W_2)) / 16 for
        each feature of a head (GLA, arXiv 2312.06635); "beta": sigmoid(x W), one a head.
      head_decay: whether "log_decay" is one number a head instead: -softplus(x W + b), from memories of 1 to 1,000
        tokens at the start (gated delta rule, arXiv 2412.06464).
      unit_keys: whether q and k are divided by their length, |q| = |k| = 1, as the delta rule needs.
      head_norm: whether each head's output is divided by its root mean square, for kernels without a normaliser.
      output_gate: whether the output is multiplied by silu(x W_gate) before W_out.
      frozen: weights of the kernel that are constants, drawn from `seed` and never trained, such as ("projection",).
      seed: of the frozen weights, which all modules of one seed and size share; they are in no checkpoint, being a function of both.
      The others: see `SequenceMixer`.

    Raises:
      ValueError: heads that do not divide the width or the key heads, a window that the kernel does not take, rotary
        positions missing on a resumed call, an unknown kernel or gate, tables without `max_length`, scores handed to a kernel that
        has none, or options that the kernel needs.

    Inputs of the kernel without a time axis (`weights` in its table line, `kernels.weights` for their first values) are parameters, in float32;
    tables of places are `max_length` long.
    A query or key that the kernel does not read (`unread` there) has no projection.

    Cost and state: the kernel's.

    >>> import jax, jax.numpy as jnp
    >>> mixer = MultiHeadAttention(8, heads=2, kv_heads=1, kernel="softmax")
    >>> jax.jit(mixer.init_with_output)(jax.random.key(0), jnp.ones((1, 3, 8)))[0].shape
    (1, 3, 8)
    """

    kernel: str = "softmax"
    options: Mapping[str, Any] | None = None
    gates: tuple[str, ...] = ()
    head_decay: bool = False
    unit_keys: bool = False
    head_norm: bool = False
    output_gate: bool = False
    frozen: tuple[str, ...] = ()
    seed: int = 0

    @nn.compact
    def __call__(
        self, x_BxTxD, *, mask=None, segment_ids=None, positions=None, state=None, return_state=False, previous_scores=None
    ):  # fmt: skip
        """See `SequenceMixer`; with `previous_scores`, (B, N, T, S), this layer's scores with those added are returned last."""
        check_inputs(x_BxTxD, self.width, mask, segment_ids)
        self._check_state(state, return_state)
        inputs = {"query": self._heads(x_BxTxD, "query", self.heads), "key": self._heads(x_BxTxD, "key", self.kv_heads)}
        inputs = self._placed(x_BxTxD, inputs, positions, state, {"mask": mask, "segment_ids": segment_ids})
        if self.unit_keys:
            inputs = {name: _unit(value) for name, value in inputs.items()}
        inputs["value"] = self._heads(x_BxTxD, "value", self.kv_heads)
        inputs.update({name: self._gate(x_BxTxD, name, mask) for name in self.gates})
        if "log_decay" in inputs and inputs["log_decay"].ndim == 4 and self._turns() == "inputs":
            inputs["log_decay"] = _one_a_pair(inputs["log_decay"])
        inputs.update(self._weights())
        self._add_bias(inputs, mask)
        out = self._kernel(
            inputs, mask, segment_ids, previous_scores, initial_state=state, return_state=return_state
        )  # fmt: skip
        out_BxTxNxH, *rest = out if isinstance(out, tuple) else (out,)
        y_BxTxD = self._output(x_BxTxD, out_BxTxNxH)
        return (y_BxTxD, *rest) if rest else y_BxTxD

    def _heads(self, x_BxTxD, name, heads):
        shape = (*x_BxTxD.shape[:2], heads, self._head_dim)
        if name in kernels.line(self.kernel).unread:
            return jnp.zeros(shape, self.dtype)
        return self._dense(heads * self._head_dim, name)(x_BxTxD).reshape(shape)

    def _placed(self, x_BxTxD, inputs, positions, state, seen):
        placing = self.placing or Placing()
        turned = self._turns()
        if turned != "nothing" or placing.log_scale != "none":
            positions = self._positions(x_BxTxD, positions, state, seen)
        if turned == "inputs":
            frequencies = placing.frequencies(self._head_dim, self.rotary_base)
            inputs = {name: rotary(value, positions, frequencies=frequencies) for name, value in inputs.items()}
        options = self.options or {}
        factor = placing.query_factor(self.kernel, options, positions, self.window, causal=self.causal, **seen)
        if not (isinstance(factor, float) and factor == 1):
            inputs["query"] = (_wide(inputs["query"]) * factor).astype(inputs["query"].dtype)
        return inputs | {"query_positions": positions} if turned == "features" else inputs

    def _turns(self):
        return (self.placing or Placing()).turns(self.kernel, self.options or {}, self.rotary_base)

    def _add_bias(self, inputs, mask):
        if self.placing is None:
            return
        refusal = self.refuses_placing()
        if refusal:
            raise ValueError(f"placing cannot be honoured: {refusal}; got {self.placing}")
        bias = self.placing.bias(self.heads, self.causal, self.param)
        if bias is not None:
            inputs["bias"] = bias
        if self.placing.kind == "xpos" and "log_decay" in inputs:
            fading = jnp.tile(jnp.asarray(xpos_decay(self._head_dim), jnp.float32), 2)
            fading = fading[None, None, None]  # padding is no distance
            inputs["log_decay"] += fading if mask is None else jnp.where(mask[..., None, None], fading, 0)

    def _positions(self, x_BxTxD, positions, state, seen):
        if positions is None and state is not None:
            raise ValueError(
                "positions must be given on a call with a state when rotary_base or a log_scale is set: "
                "the state does not count tokens"
            )
        return count_positions(x_BxTxD.shape[:2], **seen) if positions is None else signed(positions)

    def _gate(self, x_BxTxD, name, mask):
        if name not in ("log_decay", "beta"):
            raise ValueError(f"gates must be among ('log_decay', 'beta'); got {name!r}")
        if name == "beta":
            gate = nn.sigmoid(_wide(self._dense(self.heads, name)(x_BxTxD)))
        elif self.head_decay:
            gate = -nn.softplus(_wide(self._dense(self.heads, name, use_bias=True, bias_init=_rates)(x_BxTxD)))
        else:
            gate = self._feature_decay(x_BxTxD, name)
        keep = None if mask is None else mask.reshape(*mask.shape, *(1,) * (gate.ndim - 2))
        return gate if mask is None else jnp.where(keep, gate, 0)  # padding neither ages the state nor writes into it

    def _feature_decay(self, x_BxTxD, name):
        # GLA's low-rank gate; the second factor has a bias, so a token's decay can start from any value.
        low = self._dense(DECAY_RANK, f"{name}_in", use_bias=False)(x_BxTxD)
        logits = self._dense(self.heads * self._head_dim, f"{name}_out", use_bias=True)(low)
        logits = logits.reshape(*x_BxTxD.shape[:2], self.heads, self._head_dim)
        return nn.log_sigmoid(_wide(logits)) / DECAY_TEMPERATURE

    def _weights(self):
        make = kernels.weights(self.kernel)
        if make is None:
            return {}
        sizes = (self.heads, self.kv_heads, self._head_dim)
        settings = {name: x for name, x in (self.options or {}).items() if name in kernels.weight_options(self.kernel)}
        if self.fixes_length():
            if self.max_length is None:
                raise ValueError(f"max_length must be given: the kernel {self.kernel!r} has tables of places; got None")
            settings["length"] = self.max_length
        make = partial(make, **settings)
        names = jax.eval_shape(lambda: make(jax.random.key(0), *sizes))
        drawn = kernels.drawn(self.kernel, self.seed, *sizes, **settings) if self.frozen else {}
        fixed = {name: jnp.asarray(drawn[name]) for name in self.frozen}
        names = sorted(set(names) - set(fixed))
        return fixed | {name: self.param(name, lambda rng, name=name: make(rng, *sizes)[name]) for name in names}

    def _kernel(self, inputs, mask, segment_ids, previous_scores, **options):
        if self.window is not None and not self.accepts_window():
            raise ValueError(f"window must be None: the kernel {self.kernel!r} has no window; got {self.window}")
        if self.chunk_size is not None and "chunk_size" in kernels.arguments(self.kernel):
            options["chunk_size"] = self.chunk_size
        key_mask = None if mask is None else mask[:, None, None, :]
        placing, line = self.placing or Placing(), kernels.line(self.kernel)
        kernel, chosen = placing.kernel(self.kernel, self.options or {}, self.window, self._head_dim, self.rotary_base)
        if previous_scores is not None:
            if not self.accepts_scores():
                raise ValueError(f"previous_scores must be None: the kernel {self.kernel!r} hands no scores on")
            kernel = partial(line.with_scores, previous_scores=previous_scores)
        options = {**(self.options or {}), **chosen, **options}
        options = {name: x for name, x in options.items() if name not in kernels.weight_options(self.kernel)}
        missing = [name for name in line.options if name not in options]
        if missing:
            raise ValueError(f"options must give {missing} to the kernel {self.kernel!r}; got {self.options}")
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
        """The kernel's empty state; caches are of `dtype`, by default the module's. A capacity beyond `max_length` is a ValueError for tables."""
        if self.fixes_length() and capacity > (self.max_length or 0):
            raise ValueError(
                f"capacity must be at most max_length={self.max_length}, the length of the tables of {self.kernel!r}; got {capacity}"
            )
        dim = self._head_dim
        make = (self.placing or Placing()).empty_state(self.kernel, self.options or {}, self.rotary_base)
        known = inspect.signature(make).parameters
        options = {name: value for name, value in (self.options or {}).items() if name in known}
        return make(batch, capacity, self.heads, self.kv_heads, dim, dim, dtype or self.dtype, **options)

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """Projections, and 4 H for each visible key (pairwise kernels, Linformer's mixtures) or 4 M H for a state of M features (others), a
        head; the delta rule reads its state once more, 2 M H; weights of positions add their products.

        A causal pairwise kernel is counted over all `context` keys, as is usual for model FLOPs utilisation; a window
        or a pattern limits them.
        """
        inner, key_inner = self.heads * self._head_dim, self.kv_heads * self._head_dim
        wide, narrow = inner * (3 if self.output_gate else 2), 2 * key_inner
        for name in kernels.line(self.kernel).unread:
            wide, narrow = (wide - inner, narrow) if name == "query" else (wide, narrow - key_inner)
        projections = 2 * self.width * (wide + narrow)
        sizes = {"beta": self.width * self.heads, "log_decay": DECAY_RANK * (self.width + inner)}
        if self.head_decay:
            sizes["log_decay"] = self.width * self.heads
        gates = 2 * sum(sizes[name] for name in self.gates)
        if kernels.line(self.kernel).pairwise or kernels.line(self.kernel).keys_seen is not None:
            reach = context if self.window is None else self.window * (1 if self.causal else 2) + 1
            seen = min(context, reach)
            if kernels.line(self.kernel).keys_seen is not None:
                options = {**(self.options or {}), **({} if self.window is None else {"window": self.window})}
                read = {*kernels.line(self.kernel).options, *kernels.weight_options(self.kernel)}
                options = {name: x for name, x in options.items() if name in read}
                seen = kernels.line(self.kernel).keys_seen(context, self.causal, **options)
        else:
            seen = jax.tree.leaves(jax.eval_shape(lambda: self.init_state(1, 1)))[0].shape[-2]
        passes = 2 if self.gates and not self.causal else 1  # decays make the bidirectional form two passes
        further = kernels.further_flops(self.kernel, self.heads, self.kv_heads, self._head_dim, seen)
        return projections + gates + further + passes * (6 if "beta" in self.gates else 4) * inner * seen

    @nn.nowrap
    def refuses_placing(self) -> str:
        """See `SequenceMixer`."""
        return "" if self.placing is None else self.placing.refusal(self.kernel, self.window, self.options or {})

    @nn.nowrap
    def fixes_length(self) -> bool:
        """Whether the kernel has tables of places."""
        return kernels.has_tables(self.kernel)

    @nn.nowrap
    def accepts_causal(self) -> bool:
        """Whether the kernel has a causal form."""
        return kernels.has_causal_form(self.kernel)

    @nn.nowrap
    def has_positions(self) -> bool:
        """Whether positions are part of the kernel."""
        return kernels.has_positions(self.kernel)

    @nn.nowrap
    def own_options(self) -> dict[str, str]:
        """See `SequenceMixer`: the seed, the window and chunk size where the kernel takes them, and its other settings."""
        takes = {"window": self.accepts_window(), "chunk_size": "chunk_size" in kernels.arguments(self.kernel)}
        fields = ("seed",) * bool(self.frozen) + tuple(name for name, is_taken in takes.items() if is_taken)
        return dict.fromkeys(kernels.options(self.kernel), "kernel") | dict.fromkeys(fields, "field")

    @nn.nowrap
    def accepts_window(self) -> bool:
        """Whether the kernel takes `window=`."""
        return kernels.takes_window(self.kernel)

    @nn.nowrap
    def accepts_scores(self) -> bool:
        """Whether the kernel hands scores on."""
        return kernels.line(self.kernel).with_scores is not None

    @nn.nowrap
    def no_scores(self, x_BxTxD: jax.Array, state: Any) -> jax.Array:
        """The scores before the first layer, zeros (B, N, T, S) with S the slots of the state after the call."""
        length = x_BxTxD.shape[1]
        keys = length
        if state is not None:
            keys = state.key.shape[-3] + (length if state.length is None else 0)
        zeros = jnp.zeros_like(x_BxTxD[:, None, :, :1], jnp.promote_types(x_BxTxD.dtype, jnp.float32))
        return jnp.broadcast_to(zeros, (x_BxTxD.shape[0], self.heads, length, keys))


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis; 0, with a finite gradient, for x = 0."""
    wide = _wide(x)
    return scaled_rows(jax.lax.rsqrt(row_products(wide, wide) + 1e-6), wide).astype(x.dtype)


def _one_a_pair(log_decay: jax.Array) -> jax.Array:
    """Decays (B, T, N, H) with the mean of both for the features i and i + H/2, which a turn mixes."""
    first, second = jnp.split(log_decay, 2, axis=-1)
    return jnp.concatenate([(first + second) / 2] * 2, axis=-1)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rates(rng, shape, dtype=jnp.float32):
    """Biases b with softplus(b) from 1/1000 to 1, evenly in the logarithm."""
    rate = jnp.exp(jax.random.uniform(rng, shape, jnp.float32, jnp.log(1e-3), 0.0))
    return jnp.log(jnp.expm1(rate)).astype(dtype)
