"""Linear attention with turned features by the laws of every mixer: forms, states, causality, masks, segments, lengths, types, memory, devices."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn_jax.position import rotary_linear_attention
from tests.laws.checks import DOUBLE, assert_close, assert_identical, value_and_grads

B, T, N, K, H, V = 2, 13, 4, 2, 6, 5
IDS = np.array([[0] * 5 + [1] * 8, [3] * 13])
OTHER_IDS = np.array([[0] * 7 + [1] * 6, [3] * 13])
MASK = ((np.random.default_rng(3).random((B, 1, 1, T)) > 0.3) | (np.arange(T) == 0)).astype(bool)
PLACES = np.array([np.arange(T), 1_000_000 + np.arange(T)])
CASES = {
    "causal": {"is_causal": True},
    "packed": {"is_causal": True, "mask": MASK, "segment_ids": IDS},
    "both ways": {"mask": MASK, "segment_ids": IDS},
    "no order": {"mask": MASK},
    "two documents": {"segment_ids": (IDS, OTHER_IDS)},
}


def draw(length=T, keys=None, dtype=np.float64):
    rng, keys = np.random.default_rng(0), length if keys is None else keys
    shapes = ((B, length, N, H), (B, keys, K, H), (B, keys, K, V))
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def features(name, x, w):
    if name == "elu":
        return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
    if name == "cosine":
        return jnp.concatenate([jnp.ones_like(x[..., :1]), x / jnp.sqrt((x * x).sum(-1, keepdims=True))], -1)
    y = jnp.einsum("btnh,nhp->btnp", x, w)
    return jnp.concatenate([jax.nn.softmax(y, -1), jax.nn.softmax(-y, -1)], -1)


def turned(f, at):
    half = f.shape[-1] // 2
    wave = jnp.exp(1j * at[..., None] * 10000.0 ** (-np.arange(half) / half))[:, :, None]
    z = (f[..., :half] + 1j * f[..., half : 2 * half]) * wave
    return jnp.concatenate([z.real, z.imag, f[..., 2 * half :]], -1)


def reference(name, arrays, weights, *, is_causal=False, mask=None, segment_ids=None, normalize=True):
    """All pairs written out."""
    q, k, v = arrays
    ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    see = np.ones((B, T, T), bool) & (np.tril(np.ones((T, T), bool)) | (not is_causal))
    see = see if mask is None else see & mask[:, 0]
    see = see if segment_ids is None else see & (ids[0][:, :, None] == ids[1][:, None, :])
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    w = weights or (None, None)
    phi = features(name, q, w[0]), features(name, k, w[1] if weights is None else jnp.repeat(w[1], N // K, axis=0))
    above = jnp.einsum("btnm,bsnm,bts,bsnv->btnv", *(turned(f, PLACES) for f in phi), see * 1.0, v)
    below = jnp.einsum("btnm,bsnm,bts->btn", *phi, see * 1.0)[..., None]
    return above / jnp.where(below == 0, 1, below) if normalize else above


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_the_quotient_written_out(case):
    """Outputs and gradients in float64: dense, one chunk after the other, all side by side; learned maps and odd features too."""
    eye = np.random.default_rng(1).normal(size=(2, 4, H, 3))
    maps = {"elu": None, "cosine": None, "hedgehog": (eye[0], eye[1, :K])}
    maps = maps if case in ("causal", "packed") else {"elu": None}
    forms = [{"implementation": "dense"}] + [{"implementation": i, "chunk_size": 4} for i in ("chunked", "parallel")]

    def ours(name, form, tree, **more):
        weights = dict(zip(("query_weights", "key_weights"), tree[1] or ()))
        return rotary_linear_attention(
            *tree[0], query_positions=PLACES, feature_map=name, **weights, **CASES[case], **form, **more
        )

    @jax.jit
    def run(arrays, maps):
        results = {}
        for name, weights in maps.items():
            tree = (arrays, weights)
            results[name] = [value_and_grads(lambda tree, n=name: reference(n, *tree, **CASES[case]), tree)]
            results[name] += [value_and_grads(lambda tree, n=name, f=form: ours(n, f, tree), tree) for form in forms]
        plain = {"normalize": False}
        sums = [ours("elu", form, (arrays, None), **plain) for form in forms]
        return results, sums, reference("elu", arrays, None, **CASES[case], **plain)

    results, sums, above = run(draw(), maps)
    for name, (whole, *others) in results.items():
        for form, other in zip(forms, others):
            assert_close(other, whole, DOUBLE, f"{name} {form}")
    for total in sums:
        assert_close(total, above, DOUBLE)


def attend(arrays, at, **options):
    return rotary_linear_attention(*arrays, query_positions=at, is_causal=True, **options)


def test_states_lengths_and_the_future():
    """Calls split anywhere, packed rows too; more keys than queries and fewer; what comes later changes no bit."""
    arrays, ids, at = draw(dtype=np.float32), IDS, PLACES

    @jax.jit
    def run(arrays, spoiled):
        whole, last = attend(arrays, at, segment_ids=ids, return_state=True, chunk_size=4)
        parts = []
        for cut in (0, 1, 5, 12, T):
            first, state = attend(
                [x[:, :cut] for x in arrays], at[:, :cut], segment_ids=ids[:, :cut], return_state=True, chunk_size=4
            )
            tail = [x[:, cut:] for x in arrays], at[:, cut:]
            rest, state = attend(*tail, segment_ids=ids[:, cut:], return_state=True, initial_state=state, chunk_size=4)
            parts.append((jnp.concatenate([first, rest], axis=1), state))
        q, k, v = arrays
        late = attend([q[:, 9:], k, v], at[:, 9:], key_positions=at, chunk_size=4)
        early = attend([q, k[:, 9:], v[:, 9:]], at, key_positions=at[:, 9:], chunk_size=4)
        alone = attend([x[:, 9:] for x in arrays], at[:, 9:], chunk_size=4)
        return (whole, last), parts, (late, early, alone), attend(arrays, at), attend(spoiled, at)

    spoiled = [x.copy() for x in arrays]
    for x in spoiled[1:]:
        x[:, 9:] = np.nan
    whole, parts, (late, early, alone), plain, after = jax.tree.map(np.asarray, run(arrays, spoiled))
    for part in parts:
        assert_close(part, whole, 2e-6)
    assert_close(late, plain[:, 9:], 2e-6)
    assert_close(early[:, 9:], alone, 2e-6)
    assert np.abs(early[:, :9]).max() == 0  # rows before the first key see none
    assert_identical(after[:, :9], plain[:, :9])


def test_derivatives_maps_shards_and_other_devices():
    """jvp and vmap, two shards of heads and of the batch with check_vma and in the types, and programs for cpu, cuda and tpu."""
    arrays = draw(dtype=np.float32)
    tangents = [np.cos(7 * x) for x in arrays]
    at = np.arange(T)

    def call(*arrays):
        return attend(arrays, at, chunk_size=4)

    def loss(*arrays):
        return jnp.sum(jnp.sin(call(*arrays)))

    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "heads")

    @jax.jit
    def run(arrays, tangents):
        slopes = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
        forwards = jax.jvp(loss, arrays, tangents)[1]
        rows = jax.vmap(call)(*(x[:, None] for x in arrays))[:, 0]
        return slopes, forwards, rows, call(*arrays)

    slopes, forwards, rows, whole = jax.tree.map(np.asarray, run(arrays, tangents))
    np.testing.assert_allclose(sum(float(np.vdot(g, t)) for g, t in zip(slopes, tangents)), forwards, rtol=1e-4)
    assert_close(rows, whole, 2e-6)
    for implementation in ("chunked", "parallel"):

        def sharded(*arrays, i=implementation):
            inside = jax.shard_map(
                lambda *x: attend(x, at, chunk_size=4, implementation=i),
                mesh=mesh,
                in_specs=(spec,) * 3,
                out_specs=spec,
            )
            return jnp.sum(jnp.sin(inside(*arrays)))

        assert_close(jax.jit(jax.grad(sharded, argnums=(0, 1, 2)))(*arrays), slopes, 1e-5, implementation)
    typed = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(typed):
        placed = [jax.device_put(x, NamedSharding(typed, spec)) for x in arrays]
        for implementation in ("chunked", "parallel"):

            def explicit(*arrays, i=implementation):
                out = attend(arrays, at, chunk_size=4, implementation=i)
                assert jax.typeof(out).sharding.spec[0] == "data"
                return jnp.sum(jnp.sin(out))

            found = jax.jit(jax.grad(explicit, argnums=(0, 1, 2)))(*placed)
            assert_close(jax.tree.map(np.asarray, found), slopes, 1e-5, f"explicit, {implementation}")
    long = [jax.ShapeDtypeStruct((1, 1024, 2, 8), np.float32)] * 3
    program = jax.jit(jax.grad(lambda *x: jnp.sum(attend(x, np.arange(1024))), argnums=(0, 1, 2)))
    assert jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(*long).platforms == ("cpu", "cuda", "tpu")


def test_memory_and_narrow_types():
    """Both passes at T = 16,384: less room than features would take; bfloat16 within 1e-2 of float32."""
    length, heads, dim = 16_384, 2, 64
    arrays = [jax.ShapeDtypeStruct((1, length, heads, dim), np.float32)] * 3
    at = np.arange(length)
    program = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attend(x, at)), argnums=(0, 1, 2)))
    used = program.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * 4 * length * heads * dim, (
        used
    )  # output, states at chunk starts, angles; three gradients are not temporaries
    rng = np.random.default_rng(0)
    wide = [rng.normal(size=(1, 1500, 1, 16)).astype(np.float32) for _ in range(3)]
    both = jax.jit(lambda *x: (attend(x, at[:1500]), attend([y.astype(jnp.bfloat16) for y in x], at[:1500])))(*wide)
    assert both[1].dtype == jnp.bfloat16
    assert_close(np.asarray(both[1], np.float32), both[0], 1e-2)


def test_mistakes():
    q, k, v = draw(dtype=np.float32)
    calls = {
        "query_positions must broadcast to (*B, T) = (2, 13); got (5,)": lambda: attend([q, k, v], np.arange(5)),
        "key_positions must broadcast to": lambda: attend([q, k, v], PLACES, key_positions=np.arange(12)),
        "frequencies must have shape (M div 2,) = (3,); got (6,)": lambda: attend([q, k, v], PLACES, frequencies=np.ones(6)),
        "feature_map='exp' is unknown": lambda: attend([q, k, v], PLACES, feature_map="exp"),
        "initial_state must be the LinearState": lambda: attend([q, k, v], PLACES, initial_state=(1, 2)),
        "implementation='dense' has no state": lambda: attend([q, k, v], PLACES, implementation="dense", return_state=True),
    }  # fmt: skip
    for words, call in calls.items():
        with pytest.raises(ValueError) as error:
            jax.eval_shape(call)
        assert words in str(error.value), (words, str(error.value))
