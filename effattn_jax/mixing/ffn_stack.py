"""A Transformer's block of feed-forward layers alone: the one along time stands where attention stood.

    u = x + FFN_time(norm(x));   y = u + FFN_features(norm(u));   FFN(z) = W_2 gelu(W_1 z + b_1) + b_2

Cost O(T^2 D + T D^2); the weights fix the longest sequence. State: that of the layer along time. Source: Melas-Kyriazi, arXiv:2105.02723.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax.mixing._tokens import along, check_tokens, check_weight, normalize, require, wide
from effattn_jax.mixing.token_mlp import mlp_mixer

__all__ = ["ffn_stack"]


@compiled
def ffn_stack(
    inputs: ArrayLike,
    token_norm: tuple[ArrayLike, ArrayLike],
    token_ffn: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
    channel_norm: tuple[ArrayLike, ArrayLike],
    channel_ffn: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
) -> Any:
    """A whole block of feed-forward layers alone: a Transformer's, with attention replaced by a feed-forward layer along time.

    u = x + FFN_time(norm(x));   y = u + FFN_features(norm(u));   FFN(z) = W_2 gelu(W_1 z + b_1) + b_2

    Args:
      inputs: (*B, T, D), T <= T_max.
      token_norm, channel_norm: scale and shift of the layer norms over features, (D,) each.
      token_ffn: the weights of `mlp_mixer`: (F, T_max), (F,), (T_max, F), (T_max,); F = 4 T_max in the source.
      channel_ffn: (D, F), (F,), (F, D), (D,), with an F of its own, 4 D in the source.
      The others, the errors and the state: see `mlp_mixer`.

    Cost O(T^2 D + T D^2). Source: Melas-Kyriazi, arXiv:2105.02723.

    >>> import jax, jax.numpy as jnp
    >>> norm, ffn = (jnp.ones(2), jnp.zeros(2)), (jnp.ones((4, 4)), jnp.zeros(4), jnp.ones((4, 4)), jnp.zeros(4))
    >>> channels = (jnp.ones((2, 3)), jnp.zeros(3), jnp.ones((3, 2)), jnp.zeros(2))
    >>> jax.jit(ffn_stack)(jnp.ones((3, 2)), norm, ffn, norm, channels).shape
    (3, 2)
    """
    stateful = return_state or initial_state is not None
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=is_causal, stateful=stateful)
    width = tokens.inputs.shape[-1]
    norms = {"token_norm": token_norm, "channel_norm": channel_norm}
    norms = {name: [check_weight(name, w, (width,)) for w in pair] for name, pair in norms.items()}
    channel_ffn = _check_channels(channel_ffn, width)
    (x, *norm) = wide(tokens.inputs, *norms["token_norm"])
    normal = tokens.real(normalize(x, *norm)).astype(tokens.inputs.dtype)
    mixed = mlp_mixer(
        tokens.restore(normal), *token_ffn, is_causal=is_causal, mask=mask,
        segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
    )  # fmt: skip
    mixed, state = mixed if return_state else (mixed, None)
    x, *weights = wide(x + mixed.reshape(x.shape), *norms["channel_norm"], *channel_ffn)
    w1, b1, w2, b2 = weights[2:]
    z = normalize(x, *weights[:2])
    out = x + jax.nn.gelu(z @ w1 + along(b1, z)) @ w2 + along(b2, z)
    out = tokens.finish(out)
    return (out, state) if return_state else out


def _check_channels(weights: tuple, width: int) -> list[jax.Array]:
    names = ("(D, F)", "(F,)", "(F, D)", "(D,)")
    require(len(weights) == 4, f"channel_ffn must be four arrays, {', '.join(names)}; got {len(weights)}")
    hidden = jnp.shape(weights[0])[-1]
    shapes = ((width, hidden), (hidden,), (hidden, width), (width,))
    return [check_weight("channel_ffn", w, shape) for w, shape in zip(weights, shapes, strict=True)]
