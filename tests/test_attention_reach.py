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
    starts = np.minimum(np.arange(0, length, ROWS), length - ROWS)

    @jax.jit
    def of_blocks(marks):
        bounds = bounds_of(spec, marks, length, keys)
        return [span(spec, marks, bounds, block, length, keys)[:2] for block in range(len(starts))]

    return starts, np.array(of_blocks(marks))


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
        np.int32(keys - length),
        query_segments=query_ids.astype(np.int32),
        key_segments=key_ids.astype(np.int32),
    )
    if seed % 3:
        marks = marks._replace(
            key_mask=rng.random((batch, keys)) < 0.3,
            query_mask=rng.random((batch, length)) < 0.5,
        )
    window = (5, 3) if seed % 4 == 0 else (None, None)
    starts, found = spans(marks, length, keys, *window)
    whole = Spec(*window, None, 1.0, length, keys, jnp.float32)
    see = jax.jit(lambda marks: allowed(whole, marks, 1, 0, length, 0, keys))(marks)
    see = np.asarray(see).any(axis=(0, 1, 2))
    for row, (low, high) in zip(starts, found, strict=True):
        columns = np.flatnonzero(see[row : row + ROWS].any(0))
        assert columns.size == 0 or (low <= columns.min() and columns.max() < high)


@pytest.mark.parametrize("factor, padding", [(1, 0), (1, 16), (32, 0)])
def test_packed_documents_cost_their_own_squares(factor, padding):
    """Blocks of rows reach no further than the blocks of keys that their documents touch: with padding that shares a block with the last
    document, and with ids that are all equal modulo 32."""
    lengths = [17, 40, 3, 28, 60, 13]
    ids = np.concatenate([np.repeat(factor * np.arange(1, 7), lengths), np.zeros(padding, int)]).astype(np.int32)
    marks = Marks(np.int32(0), query_segments=ids[None], key_segments=ids[None])
    starts, found = spans(marks, len(ids), len(ids))
    for row, (low, high) in zip(starts, found, strict=True):
        own = np.flatnonzero(np.isin(ids, ids[row : row + ROWS]))
        assert low > own.min() - COLUMNS
        assert high < own.max() + 1 + COLUMNS


def test_long_rows_of_short_blocks_are_bounded_by_longer_stretches():
    """What meets what stays a small array; no pair is lost, and no more than a stretch's length gained."""
    length, rows, columns = 5000, 3, 2
    ids = np.repeat(np.arange(25), 200).astype(np.int32)
    marks = Marks(np.int32(0), query_segments=ids[None], key_segments=ids[None])
    spec = Spec(None, None, None, 1.0, rows, columns, jnp.float32)
    blocks = np.arange(-(-length // rows))

    @jax.jit
    def of_blocks(marks):
        bounds = bounds_of(spec, marks, length, length)
        return bounds.low, bounds.of(blocks * rows)

    stretches, (low, high) = jax.tree.map(np.asarray, of_blocks(marks))
    assert stretches.size <= 256
    starts = np.minimum(blocks * rows, length - rows)
    first, last = ids[starts] * 200, ids[starts + rows - 1] * 200 + 200
    assert (low <= first).all() and (high >= last).all()
    assert (low > first - 24 - 200).all() and (high < last + 24 + 200).all()


@pytest.mark.parametrize("chunk_size", (2, None))
def test_memory_of_packed_rows_is_linear(chunk_size):
    def temporaries(length):
        x, ids = jax.ShapeDtypeStruct((2, length, 1, 8), jnp.float32), jax.ShapeDtypeStruct((2, length), jnp.int32)

        def loss(x, ids):
            return dot_product_attention(
                x, x, x, segment_ids=ids, chunk_size=chunk_size, implementation="chunked"
            ).sum()

        return jax.jit(jax.grad(loss)).lower(x, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)


def test_masked_keys_and_queries_cost_nothing():
    keys = np.zeros((2, 40), bool)
    keys[0, 9:14], keys[1, 18:22] = True, True
    queries = np.arange(40)[None] < 6
    marks = Marks(np.int32(0), key_mask=keys, query_mask=queries)
    _, found = spans(marks, 40, 40)
    assert found.tolist() == [[8, 24]] * 2 + [[0, 0]] * 8


def test_bounds_are_one_for_all_that_vmap_maps():
    """Loops of a mapped call then have one length, and no block of theirs selects between two whole states."""
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (3, 1, 40)).astype(np.int32), axis=-1)
    spec = Spec(None, None, None, 1.0, ROWS, COLUMNS, jnp.float32)

    def of(ids):
        return bounds_of(spec, Marks(np.int32(0), query_segments=ids, key_segments=ids), 40, 40)

    @jax.jit
    def both(ids):
        return jax.vmap(of, out_axes=None)(ids), of(ids[:, 0])  # refused if they differed

    mapped, together = both(ids)
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


def test_gradients_over_packed_rows_of_a_batch(x64):
    """Rows of a batch with documents of their own, mapped or not, against all scores at once."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 50, 2, 4))
    ids = np.sort(rng.integers(0, 6, (3, 50)), axis=1).astype(np.int32)

    def loss(x, ids, form):
        return jnp.sum(
            jnp.sin(dot_product_attention(x, x, x, is_causal=False, segment_ids=ids, chunk_size=8, implementation=form))
        )

    @jax.jit
    def slopes(x, ids):
        each = jax.vmap(jax.grad(lambda x, ids: loss(x[None], ids[None], "chunked")))
        return jax.grad(loss)(x, ids, "dense"), jax.grad(loss)(x, ids, "chunked"), each(x, ids)

    expected, together, each = slopes(x, ids)
    np.testing.assert_allclose(together, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(each, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form, asked_by_nobody", [("dense", False), ("chunked", False), ("chunked", True)])
def test_queries_that_count_for_nothing_may_hold_anything(form, asked_by_nobody):
    """NaN in a query that sees no key, or (by blocks) whose output enters no loss: no gradient, and none spoiled."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 10, 2, 4)).astype(np.float32)
    here = (np.arange(10) == 3)[None]
    ids = (np.where(here, 1 - asked_by_nobody, 0).astype(np.int32), np.zeros((1, 10), np.int32))

    @jax.jit
    def gradients(query):
        def loss(query, key, value):
            out = dot_product_attention(query, key, value, segment_ids=ids, implementation=form)
            return jnp.where(here[..., None, None], 0, out).sum()

        return jax.grad(loss, (0, 1, 2))(query, x, x)

    spoiled = gradients(np.where(here[..., None, None], np.float32(np.nan), x))
    for actual, expected in zip(spoiled, gradients(x), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)
