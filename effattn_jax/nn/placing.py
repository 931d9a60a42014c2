"""How a mixer is told where its tokens stand, beyond plain rotary positions: scaled, faded, biased, or cut off at what training has seen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import position
from effattn_jax.position import log_length_scale, rotary_frequencies, yarn_temperature

BIASES = {
    "alibi": position.Alibi,
    "kerple_log": position.KerpleLog,
    "kerple_power": position.KerplePower,
    "sandwich": position.Sandwich,
    "t5": position.T5Bias,
}


@dataclasses.dataclass(frozen=True)
class Placing:
    """Options of positions that act inside a mixer; the defaults change nothing.

    Attributes:
      kind: "rotary" (where the mixer has a rotary_base), "xpos", or a bias on scores by its name.
      scaling, factor: of rotary frequencies, see `position.rotary_frequencies`.
      train_length: N, the length of training, which "yarn" and log_scale are relative to.
      log_scale: factor on scores by the number of keys n that a row sees: "train" log n / log N, "inference" at least 1, "none".
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

    def query_factor(self, positions: jax.Array, window: int | None) -> jax.Array | float:
        """The factor on queries, (B | 1, T, 1, 1) or a number."""
        factor = yarn_temperature(self.factor) ** 2 if self.scaling == "yarn" else 1.0
        if self.log_scale == "none":
            return factor
        seen = positions + 1 if window is None else jnp.minimum(positions, window) + 1
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

    def kernel(self, window: int | None, dim: int, base: float | None) -> tuple[Any, dict] | None:
        """(the function in place of softmax attention, its options), or None for softmax attention itself."""
        if self.kind == "xpos":
            return position.xpos_attention, {"base": base}
        if not self.in_kernel:
            return None
        options = {"window": self.rerope_window, "leak": self.rerope_leak}
        if self.sinks:
            options = {"window": window + 1, "sinks": self.sinks}
        turning = {"dim": 0} if base is None else {"frequencies": self.frequencies(dim, base)}
        return position.rerope_attention, {**options, **turning}

    def refusal(self, kernel: str, line: Any, window: int | None, options: Mapping[str, Any]) -> str:
        """Why a kernel of `attention.MIXERS` cannot have these positions; empty where it can."""
        exponential = line.pairwise or kernel in ("performer", "linear_hedgehog") or options.get("feature_map") == "exp"
        if self.log_scale != "none" and not exponential:
            return f"a factor on queries is no temperature in {kernel}, whose weights are not exponentials of scores: log_scale must be none"
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
