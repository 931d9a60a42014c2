"""gMLP: a linear map over time that gates, and aMLP, where a small attention joins the gate.

    z = gelu(x U + c);   z_1, z_2 = halves of z;   y = (z_1 * (W norm(z_2) + b [+ attention(x)])) V + d

Cost O(T^2 F), state: the gate's half of the document so far, T_max F / 2 numbers. W starts near 0 and b at 1: the gate starts open.
Source: Liu et al., arXiv:2105.08050.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax.attention import Cache, cache, dot_product_attention
from effattn_jax.mixing._places import PastTokens
from effattn_jax.mixing._tokens import Tokens, along, check_tokens, check_weight, normalize, require, wide
from effattn_jax.mixing.token_mlp import token_mixing

__all__ = ["AMLPState", "amlp", "gmlp", "spatial_gating"]


class AMLPState(NamedTuple):
    """What aMLP remembers: the gate's `PastTokens` and the attention's `Cache` of T_max keys."""

    gate: PastTokens
    attention: Cache


@compiled
def spatial_gating(
    inputs: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike,
    scale: ArrayLike,
    shift: ArrayLike,
    addition: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
) -> Any:
    """The spatial gating unit: y = z_1 * (W norm(z_2) + b), z_1 and z_2 the halves of the features.

    Args:
      inputs: z, (*B, T, F), F even, T <= T_max.
      kernel, bias: W (T_max, T_max), near 0 at first, and b (T_max,), 1 at first.
      scale, shift: of the layer norm over features, (F / 2,) each.
      addition: what joins the gate, (*B, T, F / 2), such as an attention's output; None for nothing.
      The others and the errors: see `token_mixing`.

    Returns:
      (*B, T, F / 2), or (out, state).

    Cost O(T^2 F), state T_max F / 2 numbers. Source: Liu et al., arXiv:2105.08050.

    >>> import jax.numpy as jnp
    >>> spatial_gating(jnp.ones((3, 8)), jnp.zeros((4, 4)), jnp.ones(4), jnp.ones(4), jnp.zeros(4)).shape
    (3, 4)
    """
    stateful = return_state or initial_state is not None
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=is_causal, stateful=stateful)
    gated, state = _gated(
        tokens, tokens.inputs, kernel, bias, scale, shift, addition, is_causal=is_causal, mask=mask,
        segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
    )  # fmt: skip
    out = tokens.finish(gated)
    return (out, state) if return_state else out


def _gated(
    tokens: Tokens, z: jax.Array, kernel: ArrayLike, bias: ArrayLike, scale: ArrayLike, shift: ArrayLike,
    addition: ArrayLike | None, *, return_state: bool, **options,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """The gated half of z (B, T, F), (B, T, F / 2), in the dtype of sums, and the state; what is remembered has the inputs' dtype."""
    width = z.shape[-1]
    require(width % 2 == 0, f"inputs must have an even number of features F; got {(*tokens.batch, *z.shape[1:])}")
    scale, shift = check_weight("scale", scale, (width // 2,)), check_weight("shift", shift, (width // 2,))
    kernel = check_weight("kernel", kernel, ("T_max", "T_max"))
    first, second, scale, shift = wide(*jnp.split(z, 2, axis=-1), scale, shift)
    remembered = normalize(second, scale, shift).astype(tokens.inputs.dtype)
    gate = token_mixing(tokens.restore(remembered), kernel, bias, return_state=return_state, **options)
    gate, state = gate if return_state else (gate, None)
    gate = gate.reshape(first.shape).astype(first.dtype)
    if addition is not None:
        addition = check_weight("addition", addition, (*tokens.batch, *first.shape[1:]))
        gate = gate + tokens.real(addition.reshape(first.shape)).astype(gate.dtype)
    return first * gate, state


def _project(x: jax.Array, kernel: ArrayLike, bias: ArrayLike, name: str) -> jax.Array:
    """x U + c, (B, T, F)."""
    kernel = check_weight(f"{name}_kernel", kernel, (x.shape[-1], "F"))
    bias = check_weight(f"{name}_bias", bias, kernel.shape[1:])
    x, kernel, bias = wide(x, kernel, bias)
    z = x @ kernel
    return z + along(bias, z)


@compiled
def gmlp(
    inputs: ArrayLike,
    in_kernel: ArrayLike,
    in_bias: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike,
    scale: ArrayLike,
    shift: ArrayLike,
    out_kernel: ArrayLike,
    out_bias: ArrayLike,
    addition: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
) -> Any:
    """gMLP's unit, y = spatial_gating(gelu(x U + c)) V + d: what is added to x.

    Args:
      inputs: (*B, T, D), T <= T_max, usually after a norm.
      in_kernel, in_bias: U (D, F) and c (F,), F even.
      kernel, bias, scale, shift, addition: see `spatial_gating`.
      out_kernel, out_bias: V (F / 2, D) and d (D,).
      The others and the errors: see `token_mixing`.

    Cost O(T^2 F + T D F), state T_max F / 2 numbers. Source: Liu et al., arXiv:2105.08050.

    >>> import jax.numpy as jnp
    >>> half = (jnp.ones(2), jnp.zeros(2))
    >>> gate = (jnp.zeros((4, 4)), jnp.ones(4), *half)
    >>> gmlp(jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.zeros(4), *gate, jnp.ones((2, 2)), jnp.zeros(2)).shape
    (3, 2)
    """
    stateful = return_state or initial_state is not None
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=is_causal, stateful=stateful)
    z = jax.nn.gelu(_project(tokens.inputs, in_kernel, in_bias, "in"))
    gated, state = _gated(
        tokens, z, kernel, bias, scale, shift, addition, is_causal=is_causal, mask=mask,
        segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
    )  # fmt: skip
    out = tokens.finish(_project(tokens.real(gated), out_kernel, out_bias, "out"))
    return (out, state) if return_state else out


@compiled
def amlp(
    inputs: ArrayLike,
    in_kernel: ArrayLike,
    in_bias: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike,
    scale: ArrayLike,
    shift: ArrayLike,
    out_kernel: ArrayLike,
    out_bias: ArrayLike,
    attention_in_kernel: ArrayLike,
    attention_out_kernel: ArrayLike,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
) -> Any:
    """aMLP's unit: `gmlp` with a softmax attention of one small head added inside the gate.

    Args:
      inputs to out_bias: see `gmlp`.
      attention_in_kernel: (D, 3 H), the query, key and value of x; H = 64 in the source.
      attention_out_kernel: (H, F / 2).
      The others and the errors: see `token_mixing`. The attention's cache holds T_max tokens in all, whatever their segments.

    Cost O(T^2 (F + H) + T D F), state T_max (F / 2 + 2 H) numbers. Source: Liu et al., arXiv:2105.08050.

    >>> import jax.numpy as jnp
    >>> gate = (jnp.zeros((4, 4)), jnp.ones(4), jnp.ones(2), jnp.zeros(2))
    >>> weights = (jnp.ones((2, 4)), jnp.zeros(4), *gate, jnp.ones((2, 2)), jnp.zeros(2), jnp.ones((2, 9)), jnp.ones((3, 2)))
    >>> amlp(jnp.ones((3, 2)), *weights).shape
    (3, 2)
    """
    stateful = return_state or initial_state is not None
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=is_causal, stateful=stateful)
    ok = initial_state is None or isinstance(initial_state, AMLPState)
    require(ok, f"initial_state must be an AMLPState of an earlier call; got {type(initial_state).__name__}")
    out_weight = check_weight("attention_out_kernel", attention_out_kernel, ("A", "F / 2"))
    heads = out_weight.shape[0]
    in_weight = check_weight("attention_in_kernel", attention_in_kernel, (tokens.inputs.shape[-1], 3 * heads))
    x, in_weight, out_weight = wide(tokens.inputs, in_weight, out_weight)
    query, key, value = jnp.split((x @ in_weight).astype(tokens.inputs.dtype)[:, :, None], 3, axis=-1)
    options, length = {}, check_weight("kernel", kernel, ("T_max", "T_max")).shape[0]
    gate_state, attention_state = (None, None) if initial_state is None else initial_state
    if stateful:
        if attention_state is None:
            attention_state = _empty_cache(tokens.inputs, length, heads)
        else:
            attention_state = _flat(attention_state, tokens.batch)
        options = {"initial_state": attention_state, "return_state": True}
    attended = dot_product_attention(
        query, key, value, mask=None if tokens.mask is None else tokens.mask[:, None, None],
        is_causal=is_causal, segment_ids=_documents(tokens.segments, gate_state, attention_state), **options,
    )  # fmt: skip
    attended, attention_state = attended if stateful else (attended, None)
    addition = tokens.restore(attended[:, :, 0].astype(x.dtype) @ out_weight)
    out = gmlp(
        inputs, in_kernel, in_bias, kernel, bias, scale, shift, out_kernel, out_bias, addition, is_causal=is_causal,
        mask=mask, segment_ids=segment_ids, initial_state=gate_state, return_state=return_state,
    )  # fmt: skip
    if not return_state:
        return out
    return out[0], AMLPState(out[1], _shaped(attention_state, tokens.restore))


def _documents(segments: jax.Array | None, gate: Any, attention: Cache | None) -> jax.Array | None:
    """The number of the document that each token is in, which go on from a state: an id that comes again is another document, as for the gate."""
    if segments is None:
        return None
    before = segments[:, :1] if gate is None else jnp.reshape(gate.segment, (-1, 1))
    begins = segments != jnp.concatenate([before, segments[:, :-1]], axis=1)
    first = 0 if attention is None else attention.last[:, None]
    return first + jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def _empty_cache(x: jax.Array, length: int, head_dim: int) -> Cache:
    """A cache of one head, made from x so that sharding and varying axes are its own."""
    zero = jnp.sum(x[..., :0], axis=(1, 2))  # (B,)

    def tied(array):
        row = zero.reshape((-1,) + (1,) * (array.ndim - 1))
        return array | (row > 0) if array.dtype == jnp.bool_ else array + row.astype(array.dtype)

    return _shaped(cache(x.shape[0], length, 1, head_dim, dtype=x.dtype), tied)


def _flat(state: Cache, batch: tuple[int, ...]) -> Cache:
    count = len(batch)
    size = 1
    for n in batch:
        size *= n
    got = [jnp.shape(x)[:count] for x in state[:-1]]
    require(
        all(shape == batch for shape in got),
        f"initial_state must have the batch axes of inputs, {batch}; its attention has {got[0]}",
    )
    return _shaped(state, lambda x: x.reshape(size, *x.shape[count:]))


def _shaped(state: Cache, reshape: Any) -> Cache:
    """The cache with `reshape` applied to all but its length, which has no batch axis."""
    return Cache(*(reshape(x) for x in state[:-1]), state.length)
