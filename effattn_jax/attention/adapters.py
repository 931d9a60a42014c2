"""Our kernels as the `attention_fn` of Flax Linen's and NNX's MultiHeadAttention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import choose

__all__ = ["as_attention_fn"]

_IGNORED_WHEN = {  # arguments of Flax that change nothing for us at these values; any other value is refused
    "dropout_rate": lambda rate, deterministic: deterministic or not rate,
    "force_fp32_for_softmax": lambda *_: True,  # ours always is
    "qk_attn_weights_einsum": lambda value, _: value is None,
    "attn_weights_value_einsum": lambda value, _: value is None,
    "einsum_dot_general": lambda value, _: value is None or value is jax.lax.dot_general,
    "einsum": lambda value, _: value is None,
}


def as_attention_fn(kernel: str | Callable, **options: Any) -> Callable:
    """A function to pass as `attention_fn` to `flax.linen.MultiHeadDotProductAttention` or `flax.nnx.MultiHeadAttention`.

    Float masks of 0 and 1 (what Linen's `make_causal_mask` makes) become boolean. Dropout of attention weights, sowing weights and custom
    einsums are refused with a ValueError, never ignored: our kernels form no weights. `dtype` casts the inputs.

    Args:
      kernel: a name of `attention.MIXERS` or any function under the contract.
      **options: passed on to the kernel, such as `is_causal=True` or `window=64`.

    Returns:
      f(query, key, value, bias=None, mask=None, *, dropout_rng, dropout_rate, broadcast_dropout, deterministic, dtype, precision, module, ...)

    Raises:
      ValueError: for an unknown name; when called, for an argument that the kernel cannot honour.

    >>> import jax, jax.numpy as jnp
    >>> attend = as_attention_fn("linear", is_causal=True)
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
    >>> attend(x, x, x, dropout_rate=0.0, deterministic=True).shape
    (1, 5, 2, 4)
    """
    if isinstance(kernel, str):
        from effattn_jax.attention import MIXERS

        choose("kernel", kernel, MIXERS)
        kernel = MIXERS[kernel].function

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        is_causal: bool = False,
    ) -> jax.Array:
        del broadcast_dropout, dropout_rng
        given = {
            "dropout_rate": dropout_rate,
            "force_fp32_for_softmax": force_fp32_for_softmax,
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
        }
        for name, setting in given.items():
            if not _IGNORED_WHEN[name](setting, deterministic):
                raise ValueError(
                    f"{name}={setting!r} cannot be honoured: this kernel forms no attention weights; leave it at its default"
                )
        if module is not None:
            raise ValueError(
                "module (sow_weights=True) cannot be honoured: this kernel forms no attention weights to sow"
            )
        if mask is not None:
            mask = mask if mask.dtype == jnp.bool_ else mask != 0
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        settings = {**options, "is_causal": is_causal or options.get("is_causal", False)}
        if precision is None:
            return kernel(query, key, value, bias, mask, **settings)
        with jax.default_matmul_precision(_precision_name(precision)):
            return kernel(query, key, value, bias, mask, **settings)

    return attention_fn


def _precision_name(precision: Any) -> str:
    if isinstance(precision, tuple):
        precision = precision[0]
    return precision if isinstance(precision, str) else jax.lax.Precision(precision).name.lower()
