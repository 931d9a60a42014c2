"""The kernel of a diagonal plus low-rank system by its generating function, with nothing raised to a power and in plain float32.

    sum_l K_l w^l = C (I - A_bar w)^-1 (I - dt/2 A)^-1 B = 2 / (1 + w) * C (s - dt A)^-1 B,          s = 2 (1 - w) / (1 + w)

at the M = 8 L points w = rho exp(-2 pi i k / M), rho^M = exp(-17) (-30 in double precision): K_l + rho^M K_(l + M) + ... comes back by an FFT, so no
C (I - A_bar^L) is needed, whose power costs O(P^3 log L) and most of the digits; and w = -1, where s is infinite, is not among the points.

What else would lose digits, and what is done about it:
- s - dt Lambda near a pole, where it is the difference of two large numbers: s is a constant in two floats, and so is the product dt Lambda;
- Woodbury's difference S_CB - S_CP (1 + S_PP)^-1 S_PB, of terms P times larger than it: B = beta P + rest, whose first part gives beta S_CP / (1 + S_PP).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax.recurrence.fft import smooth
from effattn_jax.ssm._pairs import Pair, product_error

__all__: list[str] = []

_OVERSAMPLING = 8
_BLOCK = 2**24  # entries of the temporaries of a feature


def _resolvent(real: Pair, imag: Pair, step: jax.Array, Lambda: jax.Array) -> tuple[jax.Array, jax.Array]:
    """F, G (M', 2P) real with sum_n v_n / (s - dt Lambda_n) + its conjugate pole's = (F + i G) @ [Re v, Im v], for nodes s (M',)."""
    parts = []
    for (high, low), x, sign in (
        (real, jnp.real(Lambda), -1),
        (imag, jnp.imag(Lambda), -1),
        (imag, jnp.imag(Lambda), 1),
    ):
        product = step * x
        error = product_error(jnp.broadcast_to(step, x.shape), x, product)
        parts.append((high[:, None] + sign * product[None, :]) + (low[:, None] + sign * error[None, :]))
    x, y, y_conjugate = parts
    q, q_conjugate = 1 / (x * x + y * y), 1 / (x * x + y_conjugate * y_conjugate)
    u, v = y * q, y_conjugate * q_conjugate
    F = jnp.concatenate([x * (q + q_conjugate), u - v], axis=1)
    G = jnp.concatenate([-(u + v), x * (q - q_conjugate)], axis=1)
    return F, G


def _sums(nodes: np.ndarray, step: jax.Array, Lambda: jax.Array, weights: jax.Array) -> jax.Array:
    """sum_n v_n / (s - dt Lambda_n) over both halves, (M', columns) complex, for columns v (columns, P); nodes s in blocks."""
    block = min(nodes.size, max(1, _BLOCK // (4 * Lambda.size)))
    count = -(-nodes.size // block)
    nodes = np.pad(nodes, (0, count * block - nodes.size), mode="edge").reshape(count, block)
    pairs = []
    for part in (nodes.real, nodes.imag):
        high = part.astype(step.dtype)
        pairs.append((jnp.asarray(high), jnp.asarray((part - high).astype(step.dtype))))
    columns = jnp.concatenate([weights.real, weights.imag], axis=1).T

    @jax.checkpoint
    def of_block(pairs):
        F, G = (jnp.matmul(m, columns, precision="highest") for m in _resolvent(*pairs, step, Lambda))
        return lax.complex(F, G)

    if count == 1:
        return of_block(jax.tree.map(lambda a: a[0], pairs))
    return lax.map(of_block, pairs).reshape(count * block, -1)


def _along(P: jax.Array, B: jax.Array) -> jax.Array:
    """Real beta (J, R) of the best B = beta P, over conjugate pairs; zeros where P is."""
    real = jnp.concatenate([P.real, P.imag], axis=1)
    target = jnp.concatenate([B.real, B.imag], axis=1)
    gram = jnp.einsum("rn,qn->rq", real, real, precision="highest")
    gram = gram + jnp.eye(len(real), dtype=gram.dtype) * (1e-6 * jnp.trace(gram) + jnp.finfo(gram.dtype).tiny)
    return lax.stop_gradient(solve_small(gram, jnp.einsum("rn,jn->rj", real, target, precision="highest")).T)


def solve_small(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """matrix^-1 right for (..., R, R) and (..., R, J), R <= 2."""
    if matrix.shape[-1] == 1:
        return right / matrix
    (a, b), (c, d) = (
        (matrix[..., 0, 0, None], matrix[..., 0, 1, None]),
        (matrix[..., 1, 0, None], matrix[..., 1, 1, None]),
    )
    first, second = right[..., 0, :], right[..., 1, :]
    solution = jnp.stack([d * first - b * second, a * second - c * first], axis=-2)
    return solution / (a * d - b * c)[..., None, :]


def _kernel(Lambda: jax.Array, P: jax.Array, B: jax.Array, C: jax.Array, step: jax.Array, length: int) -> jax.Array:
    """Kernels C A_bar^l (I - dt/2 A)^-1 B, (J, L), of one feature: Lambda, C (P,), P (R, P), B (J, P), step ()."""
    size = smooth(_OVERSAMPLING * length)
    size += size % 2
    decay = (17.0 if step.dtype == jnp.float32 else 30.0) / size
    w = np.exp(-decay - 2j * np.pi * np.arange(size // 2 + 1) / size)
    rank, columns = P.shape[0], B.shape[0]
    beta = _along(P, B)
    rest = B - jnp.einsum("jr,rn->jn", beta.astype(P.dtype), P, precision="highest")
    left = jnp.concatenate([C[None], P.conj()])
    right = jnp.concatenate([P, rest])
    weights = (left[:, None] * right[None]).reshape(-1, Lambda.shape[0])
    sums = _sums(2 * (1 - w) / (1 + w), step, Lambda, weights)[: w.size].reshape(-1, 1 + rank, rank + columns)
    inner = jnp.eye(rank, dtype=sums.dtype)[None] + step * sums[:, 1:, :rank]
    through = solve_small(inner, beta.T[None] - step * sums[:, 1:, rank:])
    spectrum = sums[:, 0, rank:] + jnp.sum(sums[:, 0, :rank, None] * through, axis=1)
    spectrum = spectrum * (2 / (1 + w)).astype(spectrum.dtype)[:, None]
    kernel = jnp.fft.irfft(spectrum.T, size, axis=-1)[:, :length]
    return kernel * np.exp(decay * np.arange(length))[None].astype(kernel.dtype)


def kernels(Lambda: jax.Array, P: jax.Array, B: jax.Array, C: jax.Array, step: jax.Array, length: int) -> jax.Array:
    """The same (D, J, L) from Lambda, C (D, P), P (R, D, P), B (D, J, P), step (D,); features in groups, so that temporaries stay bounded."""
    group = max(1, 2 * _BLOCK // (4 * _OVERSAMPLING * length * Lambda.shape[1]))
    inputs = (Lambda, jnp.moveaxis(P, 0, 1), B, C, step)

    def run(x):
        return _kernel(*x, length)

    if Lambda.shape[0] <= group:
        return jax.vmap(run)(inputs)
    return lax.map(run, inputs, batch_size=group)
