"""Which blocks the block kernel leaves out: none that holds a pair somebody may see, and of packed rows nearly all others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.attention import dot_product_attention, sparse_attention
from effattn_jax.attention._pairs import Marks, Spec, allowed
from effattn_jax.attention._reach import bounds_of, span

ROWS, COLUMNS = 4, 8


def spans(marks, length, keys, left=None, right=None):
    """(low, high) of every block of rows."""
    spec = Spec(left, right, None, 1.0, ROWS, COLUMNS, jnp.float32)
    bounds = bounds_of(spec, marks, length, keys)
    starts = np.minimum(np.arange(0, length, ROWS), length - ROWS)
    seen = (span(spec, marks, bounds, block, row, keys) for block, row in enumerate(starts))
    return starts, np.array([(int(s.low), int(s.high)) for s in seen])


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_left_out_that_holds_a_pair(seed):
    """Ids in any order, some far apart and some equal modulo 32, masks over queries and keys, a window or none."""
    rng = np.random.default_rng(seed)
    batch, length, keys = int(rng.integers(1, 3)), int(rng.integers(ROWS, 40)), int(rng.integers(COLUMNS, 40))
    ids = rng.choice([-(2**31), -7, 0, 1, 33, 65, 2**31 - 1], int(rng.integers(1, 7)))
    query_ids, key_ids = rng.choice(ids, (batch, length)), rng.choice(ids, (batch, keys))
    if seed % 2:
        query_ids, key_ids = np.sort(query_ids), np.sort(key_ids)
    marks = Marks(
        jnp.int32(keys - length),
        query_segments=jnp.asarray(query_ids, jnp.int32),
        key_segments=jnp.asarray(key_ids, jnp.int32),
    )
    if seed % 3:
        marks = marks._replace(
            key_mask=jnp.asarray(rng.random((batch, keys)) < 0.3),
            query_mask=jnp.asarray(rng.random((batch, length)) < 0.5),
        )
    window = (5, 3) if seed % 4 == 0 else (None, None)
    starts, found = spans(marks, length, keys, *window)
    whole = Spec(*window, None, 1.0, length, keys, jnp.float32)
    see = np.asarray(allowed(whole, marks, 1, 0, length, 0, keys)).any(axis=(0, 1, 2))
    for row, (low, high) in zip(starts, found, strict=True):
        columns = np.flatnonzero(see[row : row + ROWS].any(0))
        assert columns.size == 0 or (low <= columns.min() and columns.max() < high)


def test_packed_documents_cost_their_own_squares():
    """Blocks of rows reach no further than the blocks of keys that their documents touch, padding behind the last one or not."""
    lengths = [17, 40, 3, 28, 60, 12]
    for padding in (0, 16):
        ids = np.concatenate([np.repeat(np.arange(1, 7), lengths), np.zeros(padding, int)]).astype(np.int32)
        marks = Marks(jnp.int32(0), query_segments=jnp.asarray(ids)[None], key_segments=jnp.asarray(ids)[None])
        starts, found = spans(marks, len(ids), len(ids))
        for row, (low, high) in zip(starts, found, strict=True):
            own = np.flatnonzero(np.isin(ids, ids[row : row + ROWS]))
            assert low > own.min() - COLUMNS
            assert high < own.max() + 1 + COLUMNS


def test_masked_keys_and_queries_cost_nothing():
    keys = np.zeros((2, 40), bool)
    keys[0, 9:14], keys[1, 18:22] = True, True
    queries = np.arange(40)[None] < 6
    marks = Marks(jnp.int32(0), key_mask=jnp.asarray(keys), query_mask=jnp.asarray(queries))
    _, found = spans(marks, 40, 40)
    assert found.tolist() == [[8, 24]] * 2 + [[0, 0]] * 8


def test_bounds_are_one_for_all_that_vmap_maps():
    """Loops of a mapped call then have one length, and no block of theirs selects between two whole states."""
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (3, 1, 40)).astype(np.int32), axis=-1)
    spec = Spec(None, None, None, 1.0, ROWS, COLUMNS, jnp.float32)

    def of(ids):
        return bounds_of(spec, Marks(jnp.int32(0), query_segments=ids, key_segments=ids), 40, 40)

    mapped = jax.vmap(of, out_axes=None)(jnp.asarray(ids))  # refused if they differed
    together = of(jnp.asarray(ids[:, 0]))
    np.testing.assert_array_equal(mapped.low, together.low)
    np.testing.assert_array_equal(mapped.high, together.high)


@pytest.mark.parametrize("is_causal", (True, False))
def test_memory_of_global_tokens_in_packed_rows_is_linear(is_causal):
    """Global tokens of documents are brought together; all pairs with them would be O(T) memory too, but not less time than all pairs."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(x, ids):
            return sparse_attention(
                x, x, x, is_causal=is_causal, segment_ids=ids, window=8, dilation=16, num_global=2, chunk_size=32
            ).sum()

        return jax.jit(jax.grad(loss)).lower(x, ids).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(512), temporaries(2048)
    assert large < 4.5 * small


def test_gradients_over_packed_rows_of_a_batch():
    """Rows of a batch with documents of their own, mapped or not, against all scores at once."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 50, 2, 4)))
    ids = jnp.asarray(np.sort(rng.integers(0, 6, (3, 50)), axis=1).astype(np.int32))

    def loss(x, ids, form):
        return jnp.sum(
            jnp.sin(dot_product_attention(x, x, x, is_causal=False, segment_ids=ids, chunk_size=8, implementation=form))
        )

    expected = jax.grad(loss)(x, ids, "dense")
    np.testing.assert_allclose(jax.grad(loss)(x, ids, "chunked"), expected, atol=2e-5)
    each = jax.jit(jax.vmap(jax.grad(lambda x, ids: loss(x[None], ids[None], "chunked"))))
    np.testing.assert_allclose(each(x, ids), expected, atol=2e-5)
