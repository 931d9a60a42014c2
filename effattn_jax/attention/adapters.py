"""Our kernels as the `attention_fn` of Flax Linen's and NNX's MultiHeadAttention."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import choose

__all__ = ["as_attention_fn"]

_IGNORED_WHEN = {  # arguments of Flax that change nothing for us at these values; any other value is refused
    "dropout_rate": lambda rate, deterministic: deterministic or not rate,
    "force_fp32_for_softmax": lambda *_: True,  # ours always is
    "qk_attn_weights_einsum": lambda value, _: value is None,
    "attn_weights_value_einsum": lambda value, _: value is None,
    "einsum_dot_general": lambda value, _: value is None or value is jax.lax.dot_general,
    "promote_dtype": lambda value, _: value is None or getattr(value, "__module__", "").startswith("flax."),
    "module": lambda value, _: value is None,
}
_REASONS = {
    "promote_dtype": "inputs are cast to dtype, and the output has the dtype of value",
    "module": "it asks for attention weights, which an attention_fn of ours does not hand on; `attention_weights(kernel, ...)` gives them",
}
_MORE_RESULTS = (
    "initial_state",
    "return_state",
    "return_weights",
)  # options that an attention_fn, one array for another, has no place for


def _named(name: str) -> Callable:
    """The function of a name of the table."""
    from effattn_jax.attention import MIXERS

    functions = {getattr(mixer.function, "__name__", None): known for known, mixer in MIXERS.items()}
    if name not in MIXERS and name in functions:
        raise ValueError(
            f"kernel={name!r} is the function of {functions[name]!r}; pass that name, or the function itself"
        )
    choose("kernel", name, MIXERS)
    return MIXERS[name].function


def as_attention_fn(kernel: str | Callable, **options: Any) -> Callable:
    """A function to pass as `attention_fn` to `flax.linen.MultiHeadDotProductAttention` or `flax.nnx.MultiHeadAttention`.

    Float masks of 0 and 1 (what Linen's `make_causal_mask` makes) become boolean. Dropout of attention weights, sowing weights and custom
    einsums are refused with a ValueError, never ignored: our kernels form no weights. `dtype` casts the inputs.

    Args:
      kernel: a name of `attention.MIXERS` or any function under the contract.
      **options: passed on to the kernel, such as `is_causal=True` or `window=64`; inputs beside query, key and value (`log_decay`, the
        tables of a Synthesizer) too, and a `bias` for calls that bring none. With `is_causal=True` a layer may decode from Flax's cache:
        of a call of one query with a mask, the last key that the mask shows is the query's own, and inputs of the keys have an entry a slot.

    Returns:
      f(query, key, value, bias=None, mask=None, *, dropout_rng, dropout_rate, broadcast_dropout, deterministic, dtype, precision, module, ...)

    Raises:
      ValueError: for an unknown name or option, for an input of the kernel that is missing among the options, and for options that
        change what is returned; when called, for an argument that the kernel cannot honour.

    >>> import jax, jax.numpy as jnp
    >>> attend = as_attention_fn("linear", is_causal=True)
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
    >>> attend(x, x, x, dropout_rate=0.0, deterministic=True).shape
    (1, 5, 2, 4)
    """
    if isinstance(kernel, str):
        kernel = _named(kernel)
    _check_options(kernel, options)
    timed = _timed()

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
        promote_dtype: Any = None,
        is_causal: bool = False,
    ) -> jax.Array:
        del broadcast_dropout, dropout_rng
        given = {
            "dropout_rate": dropout_rate,
            "force_fp32_for_softmax": force_fp32_for_softmax,
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
            "promote_dtype": promote_dtype,
            "module": module,
        }
        for name, setting in given.items():
            if not _IGNORED_WHEN[name](setting, deterministic):
                reason = _REASONS.get(name, "this kernel forms no attention weights")
                argument = "sow_weights=True" if name == "module" else f"{name}={setting!r}"
                raise ValueError(f"{argument} cannot be honoured: {reason}; leave it at its default")
        if is_causal and query.shape[-3] != key.shape[-3]:
            raise ValueError(
                f"is_causal=True of Flax aligns the first query with the first key, ours the last with the last, which differ for "
                f"T={query.shape[-3]}, S={key.shape[-3]}; pass a mask, or is_causal=True to as_attention_fn"
            )
        if mask is not None:
            mask = mask if mask.dtype == jnp.bool_ else mask != 0
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        settings = {**options, "is_causal": is_causal or options.get("is_causal", False)}
        bias = settings.pop("bias", None) if bias is None else bias
        if settings["is_causal"] and mask is not None and query.shape[-3] == 1 < key.shape[-3]:
            key, value, bias, mask, settings = _filled_last(key, value, bias, mask, settings, timed)
        if precision is None:
            return kernel(query, key, value, bias, mask, **settings)
        with jax.default_matmul_precision(_precision_name(precision)):
            return kernel(query, key, value, bias, mask, **settings)

    return attention_fn


@functools.cache
def _timed() -> frozenset[str]:
    """The names of inputs beside query, key and value that have time behind the batch axes, as the table knows them."""
    from effattn_jax.attention import MIXERS

    makers = [mixer.extras for mixer in MIXERS.values() if mixer.extras is not None]
    return frozenset(name for make in makers for name in make(np.random.default_rng(0), np.zeros((1, 1, 1, 1))))


def _filled_last(
    key: jax.Array, value: jax.Array, bias: Any, mask: jax.Array, settings: dict[str, Any], timed: frozenset[str]
) -> tuple:
    """The call of one query with the empty slots behind the last real key moved in front of them, in all that has an entry a key.

    Flax's cache holds empty slots behind its tokens, hidden by a mask; where ends are aligned, as ours are, the last query stands at
    the last slot, from which windows, remainders and decays would be counted. `timed` names the options that have time behind the batch axes.
    """
    batch, keys = key.shape[:-3], key.shape[-3]
    if mask.ndim > key.ndim or mask.shape[-1:] != (keys,):
        return key, value, bias, mask, settings
    mask = mask.reshape((1,) * (key.ndim - mask.ndim) + mask.shape)
    mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    seen = mask.any((-3, -2))
    empty = jnp.where(seen.any(-1), jnp.argmax(seen[..., ::-1], axis=-1), 0)
    slots = (jnp.arange(keys).reshape((1,) * empty.ndim + (keys,)) - empty[..., None]) % keys

    def moved(x, axis):
        """An array whose first axes are those of the batch, or of size 1, and which has the keys along `axis`; another stays as it is."""
        if x.ndim <= len(batch) or x.shape[axis] != keys:
            return x
        index = [1] * x.ndim
        index[: len(batch)], index[axis] = batch, keys
        return jnp.take_along_axis(
            jnp.broadcast_to(x, (*batch, *x.shape[len(batch) :])), slots.reshape(index), axis=axis
        )

    settings = {name: moved(jnp.asarray(x), len(batch)) if name in timed else x for name, x in settings.items()}
    ids = settings.get("segment_ids")
    if isinstance(ids, tuple | list) and len(ids) == 2:
        settings["segment_ids"] = (ids[0], moved(jnp.asarray(ids[1]), len(batch)))
    if bias is not None and not callable(bias):
        bias = jnp.asarray(bias)
        bias = moved(bias.reshape((1,) * (key.ndim - bias.ndim) + bias.shape), -1)
    return moved(key, len(batch)), moved(value, len(batch)), bias, moved(mask, -1), settings


def _check_options(kernel: Callable, options: dict[str, Any]) -> None:
    from effattn_jax.attention import MIXERS

    parameters = inspect.signature(kernel).parameters
    for name in ("query", "key", "value", "mask"):
        if name in options:
            raise ValueError(f"{name} is no option of an attention_fn: the layer passes it with every call")
    for name, mixer in MIXERS.items():
        if kernel is mixer.with_scores:
            raise ValueError(
                f"kernel={kernel.__name__} returns scores beside the output; pass {name!r}, which does not"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        choose("option", name, parameters)
        if name in _MORE_RESULTS:
            raise ValueError(f"{name} is no option of an attention_fn, which returns one array; call the kernel itself")
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{name} must be given as an option: the kernel reads it beside query, key and value")


def _precision_name(precision: Any) -> str:
    """The name under which `jax.default_matmul_precision` knows a precision as Flax takes it."""
    if isinstance(precision, tuple):
        if len(set(precision)) != 1:
            raise ValueError(f"precision must be one for both operands; got {precision!r}")
        precision = precision[0]
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return precision.name
    return precision if isinstance(precision, str) else jax.lax.Precision(precision).name.lower()
