"""cuDNN's flash attention, through jax.nn: on request only, for calls that ask no more of it than it keeps."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import check_call, is_whole, scale_or

__all__: list[str] = []


def by_cudnn(
    query: Any, key: Any, value: Any, scale: Any, is_causal: bool, window: Any, refused: dict[str, Any]
) -> jax.Array:
    """out (*B, T, N, V), or the ValueError that names what cuDNN cannot honour: one of `refused` that was given, a dtype, a shape, a window.

    jax.nn aligns causality at the first query, and its window lets a query that is not causal see its whole future.
    """
    call = check_call(query, key, value, None, None, is_causal=is_causal, segment_ids=None, stateful=False)
    query, key, value = call.query, call.key, call.value
    given = [name for name, setting in refused.items() if setting is not None and setting is not False]
    half = query.dtype == key.dtype == value.dtype and query.dtype in (jnp.bfloat16, jnp.float16)
    aligned = query.shape[1] == key.shape[1] or not is_causal
    windowed = window is None or (is_causal and is_whole(window, 0))
    if given or not (half and aligned and windowed):
        got = f"{', '.join(given)} given" if given else f"{query.dtype}{query.shape}, keys {key.shape}, window {window}"
        raise ValueError(
            "implementation='cudnn' takes bfloat16 or float16 alone, is_causal only where T = S, an int window only when causal, and no bias, "
            f"mask, segment_ids, state, logits_soft_cap, chunk_size or weights; got {got}. Leave implementation None"
        )
    out = jax.nn.dot_product_attention(
        query, key, value, scale=scale_or(1 / math.sqrt(query.shape[-1]), scale), is_causal=is_causal,
        local_window_size=None if window is None else (window, 0), implementation="cudnn",
    )  # fmt: skip
    return call.restore(out)
