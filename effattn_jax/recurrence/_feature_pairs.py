"""Weights of the pairs of a chunk under a decay for each feature.

    P_ij = sum_h q_ih k_jh exp(g_{j+1,h} + ... + g_ih)        j <= i

Halve the chunk, halve the halves, and so on: the pair j < i is parted at one border, from which query i and up to which key j decays.
So the pairs parted at the same depth are one product of matrices, and log2 C such products make them all. Every exponent is a sum of
terms <= 0, never a difference of sums.
"""

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._products import grouped_product

__all__: list[str] = []


def decay_factors(decay: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """What log decays (B, K, C, H) <= 0 come to, each (B, K, C, H).

    Returns the factors between each step and the border of its block and the neighbour, in pairs of blocks of 1, 2, 4 ... steps: of the earlier
    block its end, of the later one its start; the factor from the chunk's start to each step; and that from each step to the chunk's end.
    """
    step, other = np.ogrid[: decay.shape[2], : decay.shape[2]]
    after, until = other > step, other <= step
    terms = [until, after]
    for depth in range((decay.shape[2] - 1).bit_length()):
        terms.append((step >> depth == other >> depth) & np.where(step >> depth & 1, until, after))
    sums = jnp.einsum("lim,bkmh->lbkih", np.stack(terms).astype(decay.dtype), decay, precision="highest")
    to_step, to_end, *within = jnp.exp(sums)
    return within, to_step, to_end


def feature_pairs(q: jax.Array, k: jax.Array, within: list[jax.Array]) -> jax.Array:
    """P (B, K, G, i, j) of q (B, K, G, C, H), k (B, K, C, H) and the first of `decay_factors`; of pairs j > i nothing is said."""
    steps = np.arange(k.shape[2])
    pairs = grouped_product("bkgih,bkjh->bkgij", q, k)
    for depth, factor in enumerate(within):
        block = steps >> depth
        parted = (block[:, None] == block + 1) & (block % 2 == 0)
        product = grouped_product("bkgih,bkjh->bkgij", q * factor[:, :, None], k * factor)
        pairs = jnp.where(parted, product, pairs)
    return pairs
