"""Biases by position: their published values, and every softmax kernel with one against the same call with the array that it stands for."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import attention
from effattn_jax.attention import dot_product_attention, residual_attention, sparse_attention
from effattn_jax.position import Alibi, KerpleLog, KerplePower, PositionBias, Sandwich, T5Bias, alibi_slopes, t5_bucket
from tests.laws.checks import assert_close, value_and_grads

T, N, K, H = 17, 4, 2, 8


def qkv(length=T, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, heads, H) for heads in (N, K, K)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def drawn():
    return jax.tree.map(np.asarray, jax.jit(lambda: KerpleLog.initial(N, jax.random.key(0)))())


def objects(both_ways=False):
    right = np.float32([0.3, 0.2, 0.1, 0.05]) if both_ways else None
    table = np.random.default_rng(0).normal(size=(8, N)).astype(np.float32)
    return {
        "alibi": Alibi(alibi_slopes(N), right),
        "kerple_log": drawn(),
        "kerple_power": KerplePower(np.float32([0.5, 0.4, 0.3, 0.005]), np.float32([0.5, 1.0, 1.7, 3.0])),
        "sandwich": Sandwich(1 / np.arange(1, N + 1, dtype=np.float32), dim=16),
        "t5": T5Bias(table, both_ways, max_distance=16),
    }


def formula(bias, d):
    """b(d) for integers d of any shape, in numpy terms: (N, ...)."""
    t = abs(d)
    head = lambda x: x.reshape(-1, *(1,) * d.ndim)  # noqa: E731
    if isinstance(bias, Alibi):
        slopes = jnp.where(d > 0, head(bias.slopes if bias.right is None else bias.right), head(bias.slopes))
        return -slopes * t[None]
    if isinstance(bias, KerpleLog):
        return -head(jnp.maximum(bias.scale, 0.01)) * jnp.log(1 + head(jnp.maximum(bias.rate, 0.01)) * t[None])
    if isinstance(bias, KerplePower):
        power = jnp.where(t == 0, 0.0, np.maximum(t, 1)[None] ** jnp.clip(head(bias.power), 0.01, 2))
        return -head(jnp.maximum(bias.scale, 0.01)) * power
    if isinstance(bias, Sandwich):
        waves = np.cos(d[..., None] * bias.base ** (-np.arange(0, bias.dim, 2) / bias.dim)).sum(-1)
        return head(bias.scale) * waves[None].astype(np.float32)
    bucket = np.vectorize(lambda d: reference_bucket(d, bias.bidirectional, bias.table.shape[0], bias.max_distance))(d)
    return jnp.moveaxis(bias.table[bucket], -1, 0)


def reference_bucket(d, bidirectional, buckets, far):
    base = 0
    if bidirectional:
        buckets //= 2
        base, t = (buckets if d > 0 else 0), abs(d)
    else:
        t = max(-d, 0)
    exact = buckets // 2
    if t < exact:
        return base + t
    return base + min(buckets - 1, exact + int(np.log(t / exact) / np.log(far / exact) * (buckets - exact) + 1e-9))


def test_published_values():
    np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(12)[8:], [0.70711, 0.35355, 0.17678, 0.08839], atol=1e-5)
    first = {0: 0, 1: 1, 7: 7, 8: 8, 12: 9, 16: 10, 23: 11, 32: 12, 46: 13, 64: 14, 91: 15, 10_000: 15}
    bucket = jax.jit(t5_bucket, static_argnames="bidirectional")
    places, buckets = np.array(list(first)), list(first.values())
    assert bucket(-places, bidirectional=True).tolist() == buckets
    assert bucket(places, bidirectional=True).tolist()[1:] == [16 + b for b in buckets[1:]]
    begins = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    d = np.arange(0, 400)
    expected = [t if t < 16 else 15 + sum(t >= b for b in begins) for t in d]
    assert bucket(-d, bidirectional=False).tolist() == expected
    assert bucket(np.where(d % 2, 1, 50), bidirectional=False).tolist() == [0] * 400


@jax.jit
def by_position_and_distance(biases, rows, columns, d):
    return {name: (bias(rows, columns), bias.at_distance(d)) for name, bias in biases.items()}


@functools.cache
def by_formula():
    """At the distances of rows 0 ... 6 to columns 3 ... 13."""
    d = np.arange(3, 14)[None] - np.arange(7)[:, None]
    run = jax.jit(lambda biases: {name: formula(bias, d) for name, bias in biases.items()})
    return d, run(objects(both_ways=True))


@pytest.mark.parametrize("start", [0, 1_000, 1_000_000])
def test_values_by_position_and_by_distance(start):
    """(N, T, S) from positions is the formula at the distances, wherever the row stands."""
    rows, columns = start + np.arange(7), start + np.arange(3, 14)
    d, expected = by_formula()
    for name, found in by_position_and_distance(objects(both_ways=True), rows, columns, d).items():
        for values in found:
            np.testing.assert_allclose(values, expected[name], atol=2e-5, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_sandwich_in_float64():
    bias, d = Sandwich(1 / np.arange(1.0, N + 1), dim=16), np.arange(3, 14)[None] - np.arange(7)[:, None]
    waves = np.cos(d[..., None] * bias.base ** (-np.arange(0, 16, 2) / 16)).sum(-1)
    expected = np.array(1 / np.arange(1.0, N + 1))[:, None, None] * waves
    found = by_position_and_distance({"sandwich": bias}, 1_000 + np.arange(7), 1_000 + np.arange(3, 14), d)
    by_position, by_distance = found["sandwich"]
    np.testing.assert_allclose(by_distance, expected, atol=1e-13)
    np.testing.assert_allclose(by_position, expected, atol=1e-11)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_narrow_and_unsigned_positions(dtype):
    """Differences and sizes do not wrap."""
    places = np.array([0, 100, 127]).astype(dtype)
    d = np.array([-128, 0, 127]) if dtype == "int8" else np.array([0, 127, 127])
    biases, whole = objects(both_ways=True), places.astype(np.int32)
    narrow = by_position_and_distance(biases, places, places, d.astype(dtype))
    wide = by_position_and_distance(biases, whole, whole, d)
    for name in biases:
        for found, expected in zip(narrow[name], wide[name]):
            np.testing.assert_array_equal(found, expected, err_msg=name)


def positions_of(mask, keys=T):
    """Real keys before each key, (B, S)."""
    real = np.broadcast_to(np.ones((1, keys)) if mask is None else mask[:, 0, 0], (2, keys))
    return np.cumsum(real, axis=1) - real


def as_array(bias, mask=None):
    """The (B, N, T, T) array that an object stands for."""
    place = positions_of(mask).astype(int)
    return jnp.moveaxis(formula(bias, place[:, None, :] - place[:, :, None]), 0, 1)


IDS = np.array([[0] * 5 + [1] * 12, [3] * 17])
MASK = (np.random.default_rng(1).random((2, 1, 1, T)) > 0.2) | (np.arange(T) == 0)
CASES = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 6, "logits_soft_cap": 2.0},
    "bidirectional": {"is_causal": False},
    "masked": {"is_causal": True, "mask": MASK, "segment_ids": IDS},
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_with_an_object_equal_the_dense_form_with_its_array(case):
    """Outputs and gradients, the parameters' too."""
    options = CASES[case]
    inputs = qkv()

    def by_blocks(tree):
        return dot_product_attention(*tree[0], bias=tree[1], chunk_size=5, **options)

    def dense(tree):
        return dot_product_attention(*tree[0], bias=tree[1], implementation="dense", **options)

    def all_dense(arrays, biases):
        """One program over the stacked arrays; a parameter's gradient is that of its array, pulled back through the formula."""
        stack = lambda biases: jnp.stack([as_array(b, options.get("mask")) for b in biases.values()])  # noqa: E731
        stacked, pull = jax.vjp(stack, biases)
        out, slopes = jax.vmap(lambda array: value_and_grads(dense, (arrays, array)))(stacked)
        (by_parameters,) = pull(slopes[-1])
        rows = {name: jax.tree.map(lambda x, i=i: x[i], (out, slopes[:-1])) for i, name in enumerate(biases)}
        return {n: (o, [*slopes, *jax.tree.leaves(by_parameters[n])]) for n, (o, slopes) in rows.items()}

    @jax.jit
    def both(arrays, biases):
        blocks = {name: value_and_grads(by_blocks, (arrays, bias)) for name, bias in biases.items()}
        return blocks, all_dense(arrays, biases)

    blocks, whole = both(inputs, objects(both_ways=not options["is_causal"]))
    for name in blocks:
        assert_close(blocks[name], whole[name], 1e-5, name)


def test_structures_tell_the_classes_apart():
    """Of classes that JAX takes for the same one may be computed by what was traced for the other."""
    class_of = {
        cls: jax.tree.structure(cls(*[0.0] * len(dataclasses.fields(cls)))) for cls in PositionBias.__subclasses__()
    }
    assert len(class_of) >= 5
    for (one, structure), (other, another) in itertools.combinations(class_of.items(), 2):
        assert structure != another, (one, other)


SPARSE = {
    "atrous": {"dilation": 3},
    "sparse": {"window": 2, "dilation": 3, "num_global": 1},
    "fixed": {"block": 3, "summary": 1},
    "topk": {"k": 4},
}


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "segments"])
def test_sparse_kernels(ids):
    """Patterns by blocks with an object against their dense form with its array; residual scores, which are arrays in any case."""
    inputs, bias = qkv(), objects()["kerple_log"]

    @jax.jit
    def both(arrays, bias):
        pairs = {}
        for name in ("atrous", "sparse") if ids is None else ("sparse", "fixed", "topk"):
            options = SPARSE[name]
            kernel = attention.MIXERS[name].function
            call = lambda tree, object_, kernel=kernel, options=options: kernel(  # noqa: E731
                *tree[0], bias=tree[1] if object_ else as_array(tree[1]), is_causal=True, segment_ids=ids,
                implementation="chunked" if object_ else "dense", chunk_size=5, **options,
            )  # fmt: skip
            pairs[name] = [value_and_grads(lambda tree, o=o, c=call: c(tree, o), (arrays, bias)) for o in (True, False)]
        residual = [
            residual_attention(*arrays, bias=b, is_causal=True, segment_ids=ids) for b in (bias, as_array(bias))
        ]
        return pairs | {"residual": residual}

    for name, (blocks, whole) in both(inputs, bias).items():
        assert_close(blocks, whole, 1e-5, name)


def test_steps_with_a_cache_equal_the_whole():
    """One token a call, and a prompt with padding first; the biases count what the cache shows."""
    arrays, biases, mask = qkv(), objects(), MASK

    @jax.jit
    def run(arrays, biases):
        def prompt_then_steps(bias):
            state = attention.cache(2, T, K, H)
            first = [x[:, :6] for x in arrays]
            options = {"bias": bias, "is_causal": True, "return_state": True}
            out, state = dot_product_attention(*first, mask=mask[..., :6], initial_state=state, **options)

            def step(state, t):
                one = [jax.lax.dynamic_slice_in_dim(x, t, 1, 1) for x in arrays]
                here = jax.lax.dynamic_slice_in_dim(jnp.asarray(mask), t, 1, 3)
                out, state = dot_product_attention(*one, mask=here, initial_state=state, **options)
                return state, out[:, 0]

            rest = jax.lax.scan(step, state, jnp.arange(6, T))[1]
            return jnp.concatenate([out, jnp.moveaxis(rest, 0, 1)], axis=1)

        whole = {n: dot_product_attention(*arrays, bias=b, mask=mask, is_causal=True) for n, b in biases.items()}
        return whole, {name: prompt_then_steps(bias) for name, bias in biases.items()}

    whole, steps = run([jnp.asarray(x) for x in arrays], biases)
    assert_close(steps, whole, 2e-6)


def test_any_callable_pytree_is_a_bias():
    """Without `at_distance`, and absolute: what positions it reads is the contract's."""

    @jax.tree_util.register_pytree_node_class
    class Absolute:
        def __init__(self, weight):
            self.weight = weight

        def tree_flatten(self):
            return (self.weight,), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

        def __call__(self, rows, columns):
            return self.weight[:, None, None] * jnp.sin(rows[None, :, None] + 2.0 * columns[None, None, :])

    arrays, weight = qkv(), np.arange(1, N + 1, dtype=np.float32)
    place = np.arange(T)
    array = weight[:, None, None] * np.sin(place[:, None] + 2.0 * place[None])[None].astype(np.float32)
    calls = (Absolute(weight), {"chunk_size": 5}), (array, {})
    run = jax.jit(lambda: [dot_product_attention(*arrays, bias=bias, is_causal=True, **more) for bias, more in calls])
    assert_close(*run(), 2e-6)


@pytest.mark.parametrize("name", ["alibi", "kerple_log", "kerple_power", "t5", "sandwich"])
def test_no_buffer_of_all_pairs(name):
    """T = 16,384: the compiled program of both passes, parameter gradients included, has no room for a T x T array."""
    length = 16_384
    bias = jax.tree.map(lambda x: x[..., :1], objects()[name])
    bias = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), bias)
    arrays = [jax.ShapeDtypeStruct((1, length, 1, 64), np.float32)] * 3

    def loss(arrays, bias):
        return jnp.sum(dot_product_attention(*arrays, bias=bias, is_causal=True))

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(arrays, bias)
    used = lowered.compile().memory_analysis().temp_size_in_bytes
    assert used < 40e6 < length**2, used  # a T x T array of bytes would be 268 MB
    assert f"{length}x{length}" not in lowered.as_text()


def test_refusals():
    q, k, v = qkv()
    alibi = Alibi.initial(N)
    for kernel in ("linear", "efficient", "performer", "delta_rule", "gated_linear"):
        line = attention.MIXERS[kernel]

        def call(line=line):
            more = line.extras(np.random.default_rng(0), q) if line.extras else {}
            more |= line.weights(jax.random.key(0), N, K, H) if line.weights else {}
            return line.function(q, k, v, alibi, is_causal=True, **more)

        with pytest.raises(ValueError, match=r"no pairwise scores to add a bias to; got bias by position \(Alibi\)"):
            jax.eval_shape(call)
    with pytest.raises(ValueError, match=r"with N=4; Alibi gives \(3, 1, 1\)"):
        dot_product_attention(q, k, v, Alibi.initial(3))
    with pytest.raises(ValueError, match=r"\(N, T, S\); Alibi cannot be called so"):
        dot_product_attention(q, k, v, Alibi(alibi.slopes, right=np.ones(3, np.float32)))
    with pytest.raises(ValueError, match="bias must be an array or a pytree of floating arrays"):
        dot_product_attention(q, k, v, lambda i, j: i + j)
    with pytest.raises(ValueError, match="bias"):
        dot_product_attention(q, k, v, alibi, implementation="cudnn")
    with pytest.raises(ValueError, match="relative must be integers"):
        t5_bucket(np.ones(3), bidirectional=True)
    for options in ({"num_buckets": 0}, {"num_buckets": 1}, {"num_buckets": 7, "bidirectional": True}):
        with pytest.raises(ValueError, match="num_buckets must"):
            T5Bias.initial(N, jax.random.key(0), **options)
    with pytest.raises(ValueError, match="max_distance"):
        t5_bucket(np.array([1]), bidirectional=True, max_distance=8)
    with pytest.raises(NotImplementedError):
        PositionBias()(np.arange(2), np.arange(2))
    assert jax.jit(functools.partial(sparse_attention, window=2, dilation=3))(q, k, v, alibi).shape == q.shape
