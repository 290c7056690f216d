"""JAX is the oracle of its own call, in float32; the same mathematics in `jax.numpy` with its fill, in float64.

JAX's softmax is float32 whatever the inputs, so that `jax.nn.dot_product_attention` itself has 7 digits at most.
"""

import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from funcmha import attention, attention_vjp, attention_weights, engines, init, log_sum_exp, masks, mha, mha_vjp
from funcmha.biases import Relative
from funcmha.interop import jax as adapter
from funcmha.interop.jax import FILL, dot_product_attention, dot_product_attention_vjp
from funcmha.interop.jax_bridge import as_jax_function

pytestmark = pytest.mark.usefixtures("each_engine")


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Problem:
    """The arguments of `jax.nn.dot_product_attention`; each size that is drawn is drawn from other primes."""

    B: int | None = 2  # None: without a batch
    T: int = 5
    S: int = 7
    N: int = 6
    K: int = 3
    H: int = 11
    bias: tuple[str, ...] | None = None  # the axes that it has; "1" is one that it lacks
    mask: tuple[str, ...] | None = None
    scale: float | None = None
    is_causal: bool = False
    window: int | tuple[int, int] | None = None
    query_lengths: bool = False
    key_lengths: bool = False
    strided: bool = False
    seed: int = 0

    def inputs(self, dtype="float64"):
        """query, key, value, bias, and dy; read-only."""
        rng = np.random.default_rng(self.seed)
        batch = () if self.B is None else (self.B,)
        shapes = [(*batch, self.T, self.N, self.H), *[(*batch, self.S, self.K, self.H)] * 2]
        shapes += [None if self.bias is None else self.shape(self.bias), shapes[0]]
        return [None if shape is None else self.array(rng, shape, dtype) for shape in shapes]

    def array(self, rng, shape, dtype):
        a = rng.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)
        a = a[..., ::2] if self.strided else np.ascontiguousarray(a[..., ::2])
        a.flags.writeable = False
        return a

    def shape(self, axes):
        sizes = {"B": self.B or 1, "N": self.N, "T": self.T, "S": self.S, "1": 1}
        return tuple(sizes[axis] for axis in axes)

    def static(self):
        rng = np.random.default_rng(self.seed + 1)
        B = self.B or 1
        mask = None if self.mask is None else rng.random(self.shape(self.mask)) < 0.4
        return {
            "mask": mask,
            "scale": self.scale,
            "is_causal": self.is_causal,
            "query_seq_lengths": rng.integers(0, self.T + 2, B).astype("i4") if self.query_lengths else None,
            "key_value_seq_lengths": rng.integers(0, self.S + 2, B).astype("i4") if self.key_lengths else None,
            "local_window_size": self.window,
        }


AXES = st.none() | st.sampled_from(["BNTS", "1NTS", "B1TS", "B11S", "BNT1", "111S", "NTS", "TS", "S", "1NT1"])


@st.composite
def problems(draw):
    flag, reach = st.booleans(), st.integers(0, 3)
    K = draw(st.sampled_from([1, 2, 3]))
    return Problem(
        B=draw(st.sampled_from([None, 1, 2])),
        T=draw(st.sampled_from([1, 5, 13])),
        S=draw(st.sampled_from([1, 7, 11])),
        N=K * draw(st.sampled_from([1, 2])),
        K=K,
        H=draw(st.sampled_from([1, 17])),
        bias=draw(AXES),
        mask=draw(AXES),
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
        is_causal=draw(flag),
        window=draw(st.none() | reach | st.tuples(reach, reach)),
        query_lengths=draw(flag),
        key_lengths=draw(flag),
        strided=draw(flag),
        seed=draw(st.integers(0, 2**31)),
    )


def run(problem, dtype="float64"):
    """y, gradients, and the residual, by funcmha"""
    *inputs, dy = problem.inputs(dtype)
    y, cache = dot_product_attention(*inputs, **problem.static())
    return y, dot_product_attention_vjp(cache, dy), log_sum_exp(cache)


def run_jax(f, problem, dtype="float64"):
    """y, gradients, and the residual, by f of JAX's signature"""
    *inputs, dy = problem.inputs(dtype)
    given = [i for i, x in enumerate(inputs) if x is not None]
    static = problem.static()

    def of_given(*args):
        filled = [args[given.index(i)] if i in given else None for i in range(4)]
        return f(*filled, return_residual=True, **static)

    with jax.enable_x64(dtype == "float64"):
        y, pull, lse = jax.vjp(of_given, *(jnp.asarray(inputs[i]) for i in given), has_aux=True)
        grads = dict(zip(given, pull(jnp.asarray(dy)), strict=True))
        return np.asarray(y), [None if i not in grads else np.asarray(grads[i]) for i in range(4)], np.asarray(lse)


def written_out(query, key, value, bias, *, mask, scale, is_causal, return_residual=True, **lengths_and_window):
    """JAX's formula with JAX's fill, loop-free, and in float64 throughout."""
    batched = query.ndim == 4
    q, k, v = (x if batched else x[None] for x in (query, key, value))
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    k, v = jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2)
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    allowed = np.ones((B, N, T, S), bool) if mask is None else np.broadcast_to(mask, (B, N, T, S))
    allowed = allowed & (j <= i) if is_causal else allowed
    if (window := lengths_and_window["local_window_size"]) is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        allowed = allowed & (i - left <= j) & (j <= i + right)
    if (n := lengths_and_window["key_value_seq_lengths"]) is not None:
        allowed = allowed & (j < n[:, None, None, None])
    real = np.ones((B, 1, T, 1), bool)
    if (n := lengths_and_window["query_seq_lengths"]) is not None:
        real = np.broadcast_to(i < n[:, None, None, None], (B, 1, T, 1))
    z = jnp.einsum("btnh,bsnh->bnts", q, k) * (H**-0.5 if scale is None else scale)
    z = z if bias is None else z + bias
    z = jnp.where(allowed & real, z, -0.7 * float(np.finfo("f4").max))
    y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(z, axis=-1), v) * np.moveaxis(real, 2, 1)
    lse = jnp.moveaxis(jax.nn.logsumexp(z, axis=-1), 1, 2)
    return (y, lse) if batched else (y[0], lse[0])


def check(problem, f, tolerance, dtype="float64"):
    y, grads, lse = run(problem, dtype)
    y_want, grads_want, lse_want = run_jax(f, problem, dtype)
    close(y, y_want, tolerance)
    for dx, want in zip(grads, grads_want, strict=True):
        assert (dx is None) == (want is None)
        if dx is not None:
            close(dx, want, tolerance)
    close(lse, lse_want, tolerance)


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1, np.abs(want[want > FILL / 2]).max(initial=0)))


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=2 * settings().max_examples)
@given(problems())
def test_values_gradients_and_residual_are_jax_s_formula_in_float64(problem):
    check(problem, written_out, 1e-11)
