"""Random parameters of a Linen module without compiling its initialisers."""

import jax
import jax.numpy as jnp
import numpy as np


def random_parameters(module, *inputs, seed=0):
    """Parameters with which every part has a say: matrices at the scale of their inputs, tables at 0.1, vectors about 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        name = path[-1].key
        value = 1 + 0.1 * noise if leaf.ndim < 2 else noise / leaf.shape[0] ** 0.5
        value = 0.1 * noise if name == "embedding" else value
        return jnp.asarray(value.astype(leaf.dtype))

    return jax.tree.map_with_path(draw, jax.eval_shape(module.init, jax.random.key(seed), *inputs).get("params", {}))
