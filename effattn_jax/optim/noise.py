r"""Noise on inputs, hidden layers, weights and labels.

    E L(f(x + s n), y) = L + s^2/2 laplacian_x L + O(s^4),    n ~ N(0, 1)

Small noise is a penalty: s^2/2 sum_i l_i |df_i/dx|^2 for a loss of curvature l_i in the output f_i, plus a term that vanishes
where the loss does. Source: Su, kexue.fm 7466.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.optim._selection import Select, choose
from effattn_jax.optim._trees import is_float, number, wide

KINDS = ("gaussian", "uniform", "dropout")


def hidden_noise(x: jax.Array, key: jax.Array, scale: float, *, kind: str = "gaussian") -> jax.Array:
    r"""An array with noise, for a place inside a model: x + s n, x (1 + s u) or x b / (1 - s).

    Args:
      x: a floating array.
      key: a random key.
      scale: s >= 0; for dropout the probability of 0, below 1.
      kind: "gaussian" adds s n with n ~ N(0, 1); "uniform" multiplies by 1 + s u with u ~ U(-1, 1); "dropout" keeps an entry
        with probability 1 - s and divides by it. The mean is x in each.

    Returns:
      An array like x.

    Raises:
      ValueError: for an unknown kind, a scale outside the range, or x that is not floating.

    Example:
      >>> print(jnp.unique(hidden_noise(jnp.ones(100), jax.random.key(0), 0.5, kind="dropout")))
      [0. 2.]
    """
    _check(scale, kind)
    x = jnp.asarray(x)
    if not is_float(x):
        raise ValueError(f"x must be floating, got {x.dtype}; noise on integer labels is label_noise.")
    values = wide(x)
    if kind == "gaussian":
        noisy = values + scale * jax.random.normal(key, x.shape, values.dtype)
    elif kind == "uniform":
        noisy = values * (1 + scale * jax.random.uniform(key, x.shape, values.real.dtype, -1, 1))
    else:
        noisy = jnp.where(jax.random.bernoulli(key, 1 - scale, x.shape), values / (1 - scale), 0)
    return noisy.astype(x.dtype)


def input_noise(
    loss_fn: Callable, scale: float, *, kind: str = "gaussian", select: Select = 1, forward_key: bool = False
) -> Callable:
    r"""The loss at inputs with noise: L(params, x + s n, ...), in expectation a penalty on the gradient by x.

    Args:
      loss_fn: `loss_fn(params, x, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      scale: s.
      kind: of `hidden_noise`.
      select: n, the argument with noise (1 is the first after params; floating leaves only), or (n, regular expression) for
        leaves of it by their '/'-joined path, or a regular expression for leaves of params. Real-valued targets are 2.
      forward_key: hand a child of the key on to loss_fn, as `key=`, for wrappers inside or for dropout.

    Returns:
      A function of the same arguments and form with a further keyword `key`, a random key.

    Raises:
      ValueError: for an unknown kind or a scale outside the range; by the call, where `select` matches nothing.

    Example:
      >>> noisy = input_noise(lambda w, x: jnp.mean((x - w) ** 2), 0.5)
      >>> print(f"{noisy(0.0, jnp.zeros(10000), key=jax.random.key(0)):.2f}")
      0.25
    """
    _check(scale, kind)

    def noisy(*args: Any, key: jax.Array, **kwargs: Any) -> Any:
        arrays, rebuild = choose(select, args)
        keys = jax.random.split(key, len(arrays) + 1)
        arrays = [hidden_noise(a, k, scale, kind=kind) for a, k in zip(arrays, keys[1:])]
        return loss_fn(*rebuild(arrays), **kwargs, **({"key": keys[0]} if forward_key else {}))

    return noisy


def weight_noise(
    loss_fn: Callable, scale: float, *, kind: str = "gaussian", select: str = "", forward_key: bool = False
) -> Callable:
    r"""The loss at parameters with noise, L(theta + s n): in expectation L + s^2/2 tr H, a preference for flat minima.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      scale: s.
      kind: of `hidden_noise`.
      select: a regular expression searched in the '/'-joined paths of params; all leaves by default.
      forward_key: as of `input_noise`.

    Returns:
      A function of the same arguments and form with a further keyword `key`, a random key.

    Raises:
      ValueError: as of `input_noise`.

    Example:
      >>> noisy = weight_noise(lambda w: jnp.mean(w**2), 0.5)
      >>> print(f"{noisy(jnp.zeros(10000), key=jax.random.key(0)):.2f}")
      0.25
    """
    return input_noise(loss_fn, scale, kind=kind, select=select, forward_key=forward_key)


def label_noise(
    loss_fn: Callable, rate: float, num_classes: int, *, argument: int = 2, forward_key: bool = False
) -> Callable:
    r"""The loss at labels of which a part is drawn anew: in expectation, cross-entropy with smoothed labels.

    With probability `rate` a label becomes one of the A classes, each as likely: E L(y) = (1 - rate) L(y) + rate/A sum_c L(c).
    Negative labels, which mark places to ignore, stay.

    Args:
      loss_fn: `loss_fn(params, x, labels, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      rate: probability in [0, 1].
      num_classes: A.
      argument: place of the integer labels among the arguments.
      forward_key: as of `input_noise`.

    Returns:
      A function of the same arguments and form with a further keyword `key`, a random key.

    Raises:
      ValueError: for a rate outside [0, 1] or no class; by the call, for labels that are not there or are not integers.

    Source: Szegedy et al. 2016 (arXiv 1512.00567) for the expectation.

    Example:
      >>> noisy = label_noise(lambda w, x, y: jnp.mean(y == 0), 0.5, 4)
      >>> print(f"{noisy(None, None, jnp.zeros(10000, jnp.int32), key=jax.random.key(0)):.1f}")  # 1 - 0.5 * 3/4
      0.6
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}.")
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}.")

    def noisy(*args: Any, key: jax.Array, **kwargs: Any) -> Any:
        if not 0 <= argument < len(args):
            raise ValueError(f"argument must be the place of the labels among {len(args)} arguments, got {argument}.")
        labels = jnp.asarray(args[argument])
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels must be integers, got {labels.dtype}; for real targets use input_noise(select={argument})."
            )
        key_rest, key_where, key_class = jax.random.split(key, 3)
        drawn = jax.random.randint(key_class, labels.shape, 0, num_classes, labels.dtype)
        changed = jax.random.bernoulli(key_where, rate, labels.shape) & (labels >= 0)
        args = (*args[:argument], jnp.where(changed, drawn, labels), *args[argument + 1 :])
        return loss_fn(*args, **kwargs, **({"key": key_rest} if forward_key else {}))

    return noisy


def _check(scale: float, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    if not number(scale) >= 0 or (kind == "dropout" and not number(scale) < 1):
        raise ValueError(f"scale must not be negative, and below 1 for dropout, got {scale}.")
