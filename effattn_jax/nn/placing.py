"""How a mixer is told where its tokens stand, beyond plain rotary positions: scaled, faded, biased, or cut off at what training has seen."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import position
from effattn_jax.attention.features import num_features
from effattn_jax.nn import kernels
from effattn_jax.position import log_length_scale, rotary_frequencies, yarn_temperature
from effattn_jax.position.linear import rotary_linear_state

BIASES = {
    "alibi": position.Alibi,
    "kerple_log": position.KerpleLog,
    "kerple_power": position.KerplePower,
    "sandwich": position.Sandwich,
    "t5": position.T5Bias,
}
OWN_BASE = 10000.0  # of kernels that turn queries and keys whatever the model's positions are
# Maps whose products are no function of q . k: their features are turned, in the numerator (see `position.rotary_linear_attention`).
TURNED_MAPS = ("elu", "relu", "dpfp", "hedgehog")


@dataclasses.dataclass(frozen=True)
class Placing:
    """Options of positions that act inside a mixer; the defaults change nothing.

    Attributes:
      kind: "rotary" (where the mixer has a rotary_base), "xpos", or a bias on scores by its name.
      scaling, factor: of rotary frequencies, see `position.rotary_frequencies`.
      train_length: N, the length of training, which "yarn" and log_scale are relative to.
      log_scale: factor on scores by the number of keys n that a row sees: "train" log n / log N, "inference" at least 1, "none". Causal, n
        follows from the row's position, which counts real tokens, its window and its sinks: keys hidden inside a window are counted too. Both ways
        it is the real keys of the segment, a run of equal ids, that window and sinks leave. A kernel's own pattern beside a window is not counted.
      rerope_window, rerope_leak: see `position.rerope_attention`; None is no such window.
      sinks: how many first tokens stay visible beside a window; their distances then end at the window's.
    """

    kind: str = "rotary"
    scaling: str = "none"
    factor: float = 1.0
    train_length: int | None = None
    log_scale: str = "none"
    rerope_window: int | None = None
    rerope_leak: float = 0.0
    sinks: int = 0

    def frequencies(self, dim: int, base: float) -> np.ndarray:
        """(dim/2,) angles a position."""
        return rotary_frequencies(
            dim, base=base, scaling=self.scaling, factor=self.factor, train_length=self.train_length
        )

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel turns queries and keys itself, so that its state keeps them as they came."""
        return self.kind == "xpos" or self.rerope_window is not None or self.sinks > 0

    def query_factor(
        self, kernel: str, options: Mapping[str, Any], positions: jax.Array, window: int | None, *, causal: bool = True,
        mask: jax.Array | None = None, segment_ids: jax.Array | None = None,
    ) -> jax.Array | float:  # fmt: skip
        """The factor on queries, (B | 1, T, 1, 1) or a number; 1 where it would be no temperature.

        Causal, positions (B | 1, T) say how many keys come before; both ways, mask and segment_ids (B, T) say which keys there are.
        """
        tempered = self.scaling == "yarn" and _exponential(kernel, options)
        factor = yarn_temperature(self.factor) ** 2 if tempered else 1.0
        if self.log_scale == "none":
            return factor
        if not causal:
            seen = _seen_both_ways(positions.shape[1], mask, segment_ids, window, self.sinks)
        else:
            seen = (positions if window is None else jnp.minimum(positions, window + self.sinks)) + 1
        scale = log_length_scale(seen, self.train_length, at_least_one=self.log_scale == "inference")
        return factor * scale[..., None, None]

    def bias(self, heads: int, causal: bool, param: Any) -> Any:
        """The bias object, its learned arrays made by `param(name, initial)`; None for positions of another kind."""
        if self.kind not in BIASES:
            return None
        make = BIASES[self.kind].initial
        options = {"bidirectional": not causal} if self.kind == "t5" else {}
        shape = jax.eval_shape(lambda: make(heads, jax.random.key(0), **options))
        if self.kind == "alibi":  # its slopes are constants
            return make(heads)
        leaves, tree = jax.tree.flatten(shape)

        def one(index):
            return lambda rng: jax.tree.leaves(make(heads, rng, **options))[index]

        return tree.unflatten([param(f"position_bias_{i}", one(i)) for i in range(len(leaves))])

    def turns(self, kernel: str, options: Mapping[str, Any], base: float | None) -> str:
        """What rotary positions turn: "inputs", queries and keys before the kernel; their "features"; "nothing", or what the kernel turns itself."""
        in_kernel = kernels.has_positions(kernel) or (kernel == "softmax" and self.in_kernel)
        if base is None or kernels.line(kernel).unread or in_kernel:
            return "nothing"
        return "features" if _feature_map(kernel, options) in TURNED_MAPS else "inputs"

    def kernel(
        self, kernel: str, options: Mapping[str, Any], window: int | None, dim: int, base: float | None
    ) -> tuple[Any, dict]:
        """(the function of a kernel with these positions, its options); a window that it does not take becomes another of its options."""
        if self.turns(kernel, options, base) == "features":
            name = _feature_map(kernel, options)
            frequencies = self.frequencies(num_features(name, dim), base)
            return position.rotary_linear_attention, {"feature_map": name, "frequencies": frequencies}
        if kernel == "xpos" or (kernel == "softmax" and self.kind == "xpos"):
            return position.xpos_attention, {"base": base or OWN_BASE}
        chosen = {"window": self.rerope_window, "leak": self.rerope_leak}
        if kernel == "rerope":
            chosen = {k: v for k, v in chosen.items() if v is not None}
            return position.rerope_attention, {**chosen, "frequencies": self.frequencies(dim, base or OWN_BASE)}
        if kernel != "softmax" or not self.in_kernel:
            return kernels.line(kernel).function, {} if window is None else {"window": window}
        if self.sinks:
            chosen = {**chosen, "window": window + 1, "sinks": self.sinks}
        turning = {"dim": 0} if base is None else {"frequencies": self.frequencies(dim, base)}
        return position.rerope_attention, {**chosen, **turning}

    def empty_state(self, kernel: str, options: Mapping[str, Any], base: float | None) -> Callable:
        """What makes the state of that function before the first token, as `Mixer.empty_state` says."""
        if self.turns(kernel, options, base) == "features":
            return partial(rotary_linear_state, feature_map=_feature_map(kernel, options))
        return kernels.line(kernel).empty_state

    def refusal(self, kernel: str, window: int | None, options: Mapping[str, Any]) -> str:
        """Why a kernel cannot have these positions; empty where it can."""
        line = kernels.line(kernel)
        if self.log_scale != "none" and not _exponential(kernel, options):
            return f"a factor on queries is no temperature in {kernel}, whose weights are not exponentials of scores: log_scale must be none"
        if kernels.has_positions(kernel):
            return self._second(kernel)
        if self.kind in BIASES and not line.pairwise:
            return f"{kernel} has no pairwise scores to add a bias to"
        if self.kind == "xpos" and kernel not in ("softmax", "gated_linear"):
            return f"{kernel} cannot fade with the distance; softmax and gated_linear can"
        if self.kind == "xpos" and (window is not None or self.rerope_window or self.sinks):
            return "xpos has no window of its own, no rerope and no sinks"
        if (self.rerope_window or self.sinks) and kernel != "softmax":
            return f"rerope and sinks are a form of softmax attention; {kernel} has no such distances"
        if self.sinks and window is None:
            return "sinks need a window that leaves tokens out"
        return ""

    def _second(self, kernel: str) -> str:
        """Why a kernel with positions of its own cannot have these besides."""
        own = f"{kernel} has positions of its own"
        if self.kind != "rotary" and (kernel, self.kind) not in (("tupe", "t5"), ("xpos", "xpos")):
            return f"{own} and takes no {self.kind}"
        if self.sinks or (kernel != "rerope" and (self.scaling != "none" or self.rerope_window)):
            return f"{own}, which rotary_scaling, rerope_window and sinks do not change"
        if kernel in ("xl", "tupe", "disentangled") and self.log_scale != "none":
            return f"a factor on queries does not reach all terms of the scores of {kernel}: log_scale must be none"
        return ""


def _seen_both_ways(
    length: int, mask: jax.Array | None, segment_ids: jax.Array | None, window: int | None, sinks: int
) -> jax.Array:
    """How many real keys of its segment a row sees inside its window and among the first of the segment, (B | 1, T), 1 where there are none."""
    real = jnp.ones((1, length), jnp.int32) if mask is None else mask.astype(jnp.int32)
    through = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    before, first, last = through - real, 0, through[:, -1:]
    if segment_ids is not None:
        new, edge = segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)
        first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, new], axis=1), before, 0), axis=1)
        last = jax.lax.cummin(jnp.where(jnp.concatenate([new, edge], axis=1), through, length), axis=1, reverse=True)
    if window is None:
        return jnp.maximum(last - first, 1)
    # Counts grow along a row, so a bound of the segment and one of the window meet in the larger, or the smaller, of the two.
    near = min(window, length)
    low = jnp.maximum(jnp.pad(before[:, : length - near], ((0, 0), (near, 0))), first)
    high = jnp.minimum(jnp.pad(through[:, near:], ((0, 0), (0, near)), constant_values=length), last)
    outside = jnp.minimum(low - first, sinks) + jnp.maximum(jnp.minimum(first + sinks, last) - high, 0)
    return jnp.maximum(high - low + outside, 1)


def _exponential(kernel: str, options: Mapping[str, Any]) -> bool:
    """Whether weights are exponentials of products with the query, so that a factor on it is a temperature."""
    return (
        kernels.line(kernel).pairwise or kernel == "performer" or _feature_map(kernel, options) in ("hedgehog", "exp")
    )


def _feature_map(kernel: str, options: Mapping[str, Any]) -> Any:
    """The feature map of linear attention, None for other kernels."""
    return {"linear": options.get("feature_map", "elu"), "linear_hedgehog": "hedgehog"}.get(kernel)
