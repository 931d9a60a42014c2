"""Our kernels inside the attention layers of other people's models: the same weights give what the kernel gives by hand."""

import functools
import inspect

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.attention import MIXERS, as_attention_fn, residual_attention
from effattn_jax.position import Alibi

B, T, D, N = 2, 7, 8, 2
H = D // N
KERNELS = {
    "softmax": {"window": 3},
    "linear": {"feature_map": "relu"},
    "residual": {},
    "synthesizer_dense": {},
    "synthesizer_mixed": {},
}


def options_of(name: str, **options) -> dict:
    """The kernel's options, its weights and its inputs beside query, key and value."""
    line, rng = MIXERS[name], np.random.default_rng(4)
    if line.weights is not None:
        with_length = {"length": 16} if "synthesizer" in name else {}
        shapes = jax.eval_shape(lambda: line.weights(jax.random.key(3), N, N, H, **with_length))
        options |= {key: rng.normal(size=leaf.shape).astype(leaf.dtype) for key, leaf in shapes.items()}
    if line.extras is not None:
        options |= line.extras(rng, np.zeros((B, T, N, H), np.float32))
    return options


def small(seed: int = 0):
    """Tokens (B, T, D), and the four projections of a layer with their biases, by name."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return normal(B, T, D), {
        name: (normal(D, D) / np.float32(D**0.5), np.float32(0.1) * normal(D))
        for name in ("query", "key", "value", "out")
    }


def by_hand(kernel, x, weights, **options):
    """Raw JAX: project, call the kernel, project."""

    def project(name, x):
        kernel, bias = weights[name]
        return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (D,))

    heads = [project(name, x).reshape(*x.shape[:-1], N, H) for name in ("query", "key", "value")]
    return project("out", kernel(*heads, **options).reshape(x.shape))


def flax_parameters(weights) -> dict:
    """The same weights as Flax keeps them: heads on axes of their own."""
    shapes = {"kernel": {"out": (N, H, D)}, "bias": {"out": (D,)}}
    return {
        name: {
            "kernel": kernel.reshape(shapes["kernel"].get(name, (D, N, H))),
            "bias": bias.reshape(shapes["bias"].get(name, (N, H))),
        }
        for name, (kernel, bias) in weights.items()
    }


def in_linen(name, x, weights, mask=None, options=None, **settings):
    layer = linen.MultiHeadDotProductAttention(
        num_heads=N, attention_fn=as_attention_fn(name, **(options or {})), **settings
    )
    return layer.apply({"params": flax_parameters(weights)}, x, mask=mask)


def in_nnx(name, x, weights, mask=None, options=None, call=None, **settings):
    layer = nnx.MultiHeadAttention(
        num_heads=N, in_features=D, decode=False, attention_fn=as_attention_fn(name, **(options or {})), rngs=nnx.Rngs(0),
        kernel_init=nnx.initializers.zeros_init(), **settings
    )  # fmt: skip
    for part, arrays in flax_parameters(weights).items():
        for leaf, array in arrays.items():
            getattr(getattr(layer, part), leaf)[...] = array
    return layer(x, mask=mask, **(call or {}))


class EquinoxAttention(eqx.Module):
    """Equinox's layer fixes its attention function, so this one takes its projections; kernels need no batch axis, as Equinox has none."""

    layer: eqx.nn.MultiheadAttention
    kernel: callable = eqx.field(static=True)
    options: dict

    def __call__(self, x, mask=None):
        parts = (self.layer.query_proj, self.layer.key_proj, self.layer.value_proj)
        heads = [jax.vmap(part)(x).reshape(*x.shape[:1], self.layer.num_heads, -1) for part in parts]
        out = self.kernel(*heads, mask=mask, **self.options)
        return jax.vmap(self.layer.output_proj)(out.reshape(x.shape))


def in_equinox(name, x, weights, mask=None, **options):
    biases = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
    layer = eqx.nn.MultiheadAttention(N, D, key=jax.random.key(0), **biases)
    for part in ("query", "key", "value", "output"):
        kernel, bias = weights["out" if part == "output" else part]
        place = f"{part}_proj"
        layer = eqx.tree_at(lambda m, p=place: (getattr(m, p).weight, getattr(m, p).bias), layer, (kernel.T, bias))
    return eqx.filter_vmap(EquinoxAttention(layer, MIXERS[name].function, options), in_axes=(0, None))(x, mask)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_every_member_is_an_attention_fn(name):
    """Weights and further inputs of a kernel go in as options; without them the error names the first that is missing."""
    x, weights = small()
    options = options_of(name, is_causal="causality" not in MIXERS[name].exempt) | dict(MIXERS[name].options)

    @jax.jit
    def both(x, weights):
        return in_linen(name, x, weights, options=options), by_hand(MIXERS[name].function, x, weights, **options)

    close(*both(x, weights))
    parameters = inspect.signature(MIXERS[name].function).parameters
    needed = [key for key in parameters if key in options and parameters[key].default is inspect.Parameter.empty]
    if needed:
        with pytest.raises(ValueError, match=f"{needed[0]} must be given as an option"):
            as_attention_fn(name, is_causal=True)
    with pytest.raises(ValueError, match="return_state is no option of an attention_fn"):
        as_attention_fn(name, **options, return_state=True)
    with pytest.raises(ValueError, match="option='is_casual' is unknown; did you mean 'is_causal'"):
        as_attention_fn(name, is_casual=True)


@pytest.mark.parametrize("name", KERNELS)
def test_linen(name):
    """Linen's MultiHeadDotProductAttention, with a key mask as its makers give it (floats of 0 and 1)."""
    x, weights = small()
    options = options_of(name, is_causal=True, **KERNELS[name])
    real = np.arange(T)[None] >= np.array([[0], [3]])

    @jax.jit
    def both(x, weights):
        mask = linen.make_attention_mask(jnp.ones((B, 1)), real)
        expected = by_hand(MIXERS[name].function, x, weights, mask=real[:, None, None], **options)
        return in_linen(name, x, weights, mask=mask, options=options), expected

    close(*both(x, weights))


@pytest.mark.parametrize("name", KERNELS)
def test_nnx(name):
    """NNX's MultiHeadAttention; its own is_causal counts too."""
    x, weights = small(1)
    options = options_of(name, **KERNELS[name])
    own = "is_causal" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters  # Colab's Flax does not know it

    @jax.jit
    def run(x, weights):
        expected = by_hand(MIXERS[name].function, x, weights, is_causal=True, **options)
        by_option = in_nnx(name, x, weights, options=options | {"is_causal": True})
        by_call = [in_nnx(name, x, weights, options=options, call={"is_causal": True})] if own else []
        return expected, [by_option, *by_call]

    expected, found = run(x, weights)
    for out in found:
        close(out, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_equinox(name):
    x, weights = small(2)
    options = options_of(name, is_causal=True, **KERNELS[name])
    mask = np.arange(T)[None, None] != 2

    @jax.jit
    def both(x, weights):
        expected = by_hand(MIXERS[name].function, x, weights, mask=mask[None], **options)
        return in_equinox(name, x, weights, mask=mask, **options), expected

    close(*both(x, weights))


@pytest.mark.parametrize("name", KERNELS)
def test_raw_jax(name):
    """A layer in a few lines of JAX: one kernel call over the batch is the calls on its rows, under jit and grad."""
    x, weights = small(3)
    options = options_of(name, is_causal=True, **KERNELS[name])

    def loss(weights, x):
        return jnp.sum(by_hand(MIXERS[name].function, x, weights, **options) ** 2)

    gradient = jax.jit(jax.grad(loss))
    whole, *rows = [gradient(weights, part) for part in (x, *x)]
    jax.tree.map(lambda g, *parts: np.testing.assert_allclose(g, sum(parts), rtol=2e-4, atol=2e-4), whole, *rows)


def test_softmax_equals_the_layers_own():
    """With the softmax kernel the layers give what they give without us."""
    x, weights = small(4)

    @jax.jit
    def run(x, weights):
        causal, parameters = linen.make_causal_mask(jnp.ones((B, T))), {"params": flax_parameters(weights)}
        own = linen.MultiHeadDotProductAttention(num_heads=N).apply(parameters, x, mask=causal)
        with_mask = [layer("softmax", x, weights, mask=causal) for layer in (in_linen, in_nnx)]
        return own, [*with_mask, in_equinox("softmax", x, weights, is_causal=True)]

    own, found = run(x, weights)
    for out in found:
        close(out, own)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 cannot be honoured"),
        ({"module": object()}, "sow_weights=True"),
        ({"einsum_dot_general": jnp.dot}, "einsum_dot_general=.* cannot be honoured"),
        ({"promote_dtype": lambda *x, **_: x}, "promote_dtype=.* cannot be honoured"),
        ({"mask": np.ones((B, 1, T, T), bool)}, "cannot honour a mask over"),
        ({"bias": np.ones((B, 1, T, T), np.float32)}, "no pairwise scores to add a bias to"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(arguments, reason):
    x = np.ones((B, T, N, H), np.float32)
    with pytest.raises(ValueError, match=reason):
        as_attention_fn("linear")(x, x, x, **arguments)


def test_what_changes_nothing_is_accepted():
    x = small()[0].reshape(B, T, N, H)
    attend = as_attention_fn("softmax", is_causal=True)
    settings = {
        "dropout_rate": 0.5,
        "deterministic": True,
        "promote_dtype": nnx.nn.dtypes.promote_dtype,
        "precision": "highest",
    }

    @jax.jit
    def run(x):
        expected = MIXERS["softmax"].function(x, x, x, is_causal=True)
        return attend(x, x, x, **settings), expected, attend(x, x, x, dtype=jnp.bfloat16)

    out, expected, narrow = run(x)
    close(out, expected)
    assert narrow.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="is_causal=True of Flax aligns the first query"):
        as_attention_fn("softmax")(x[:, :3], x, x, is_causal=True)


@pytest.mark.parametrize(
    "name",
    ["softmax", "local", "sparse", "fixed", "synthesizer_random", "retention", "gated_linear", "gated_delta_rule"],
)
def test_decoding_from_flax_cache(name):
    """Linen's cache has empty slots behind its tokens, hidden by a mask: token by token is what the whole row gives."""
    slots, mask = 9, None
    options = options_of(name, is_causal=True, **MIXERS[name].options)
    if name == "softmax":
        options["bias"] = Alibi(np.float32([0.5, 0.25]))
    if name == "local":
        mask = np.ones((B, N, 1, slots), bool)  # a mask of the caller's, with an axis of heads
    x, weights = small()
    whole = jax.jit(functools.partial(in_linen, name, options=options))(x, weights)
    for timed in ("log_decay", "beta"):
        if timed in options:
            options[timed] = np.pad(options[timed], [(0, 0), (0, slots - T), (0, 0)])
    layer = linen.MultiHeadDotProductAttention(num_heads=N, attention_fn=as_attention_fn(name, **options), decode=True)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros((B, slots, D))))
    parameters = flax_parameters(weights)
    step = jax.jit(lambda cache, x: layer.apply({"params": parameters, "cache": cache}, x, mask=mask, mutable="cache"))
    cache, rows = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["cache"]), []
    for i in range(T):
        row, mutated = step(cache, x[:, i : i + 1])
        cache = mutated["cache"]
        rows.append(row)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), whole, rtol=1e-5, atol=1e-5)


def test_keys_in_front_and_padding_behind():
    """Ends are aligned whatever a mask hides; only of a single query, as Flax decodes, the last key shown is its own."""
    rng, mask = np.random.default_rng(0), np.array([True] * 4 + [False])
    query, key = (rng.normal(size=(1, n, N, H)).astype(np.float32) for n in (3, 5))
    ids = np.zeros((1, 1), int), np.array([[1, 0, 0, 0, 0]])

    @jax.jit
    def run(query, key, mask):
        options = {"mask": mask, "is_causal": True, "window": 1}
        expected = MIXERS["local"].function(query, key, key, **options)
        found = as_attention_fn("local", window=1, is_causal=True)(query, key, key, mask=mask[None, None, None])
        alone, shown = query[:, :1], key[:, 1:4]
        last = MIXERS["local"].function(alone, shown, shown, is_causal=True, window=3)
        attend = as_attention_fn("local", window=3, is_causal=True, segment_ids=ids)
        return (found, attend(alone, key, key, mask=mask[None, None, None])), (expected, last)

    for found, expected in zip(*run(query, key, mask)):
        close(found, expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: as_attention_fn("softmax", mask=np.ones((T, T), bool)), "mask is no option"),
        (lambda: as_attention_fn(residual_attention), "pass 'residual'"),
        (
            lambda: as_attention_fn("softmax")(
                *[np.ones((1, 2, 1, 4), np.float32)] * 3, precision=("highest", "default")
            ),
            "one for both",
        ),
    ],
)
def test_options_that_no_layer_can_have(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_precision_by_preset():
    x, presets = np.ones((1, 2, 1, 4), np.float32), jax.lax.DotAlgorithmPreset
    precisions = (presets.F32_F32_F32, jax.lax.Precision.HIGH, ("highest", "highest"))
    run = jax.jit(lambda x: [as_attention_fn("softmax")(x, x, x, precision=precision) for precision in precisions])
    for out in run(x):
        np.testing.assert_array_equal(out, x)
