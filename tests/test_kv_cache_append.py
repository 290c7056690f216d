"""Decoding with a cache against the full forward and torch, and that no value changes, however it is appended to."""

import copy
import gc
import importlib
import pickle
import sys
import threading
import weakref

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given

from funcmha import attention, attention_vjp, attention_weights, masks
from funcmha.kv_cache import AppendCache, KVCache, append, append_vjp, empty, step_mask
from funcmha.rotary import frequencies, rotate, rotate_vjp, table
from funcmha.testing import check_vjp

BUFFERS = importlib.import_module("funcmha.kv_cache.append")  # as funcmha.kv_cache.append is the function
STEPS = {"one by one": [1] * 11, "a prompt, then one by one": [7, 1, 1, 1, 1], "several": [3, 5, 2, 1], "at once": [11]}
LEFTS = [None, 0, 2, 5, 13]
each_step = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
each_left = pytest.mark.parametrize("left", LEFTS)


def draw(*shapes, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def problem(T=11, batch=(2,), H=6, K=3, D=5, E=7):
    """q, k, v, do"""
    return draw((*batch, H, T, D), (*batch, K, T, D), (*batch, K, T, E), (*batch, H, T, E))


def split(x, steps):
    return np.split(x, np.cumsum(steps)[:-1], axis=-2)


def forward(q, k, v, steps, **static):
    """What each step gives: output, cache of append, cache of attention; and the last value."""
    left, engine = static.get("left"), static.get("engine")
    kv, done = empty(k, v), []
    for q_t, k_t, v_t in zip(*(split(x, steps) for x in (q, k, v)), strict=True):
        kv, appended = append(kv, k_t, v_t, left=left)
        mask = step_mask(kv, q_t.shape[-2], left=left)
        o, attended = attention(q_t, kv.keys, kv.values, mask=mask, engine=engine)
        done.append((o, appended, attended))
    return done, kv


def backward(done, kv, do):
    """dq, dk, dv: the steps from the last to the first, with the gradient of what is held handed on."""
    dkeys, dvalues, grads = np.zeros(kv.keys.shape), np.zeros(kv.values.shape), []
    for (_, appended, attended), do_t in zip(reversed(done), reversed(do), strict=True):
        dq, dk, dv, *_ = attention_vjp(attended, do_t)
        dpast, dk, dv = append_vjp(appended, (dkeys + dk, dvalues + dv))
        dkeys, dvalues = dpast.keys, dpast.values
        grads.append((dq, dk, dv))
    return [np.concatenate(parts[::-1], axis=-2) for parts in zip(*grads, strict=True)]


# ── a step at a time is all at once ──────────────────────────────────────────────────────────────────────────────


@each_step
@each_left
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("K", [1, 3, 6])
def test_steps_equal_the_full_forward(engine, steps, left, batch, K):
    q, k, v, _ = problem(batch=batch, K=K)
    want, cache = attention(q, k, v, mask=masks.window(left, 0), engine=engine)
    done, kv = forward(q, k, v, steps, left=left, engine=engine)
    np.testing.assert_allclose(np.concatenate([o for o, *_ in done], axis=-2), want, rtol=0, atol=1e-13)
    rows = split(attention_weights(cache), steps)
    for (*_, attended), row, total in zip(done, rows, np.cumsum(steps), strict=True):
        got = attention_weights(attended)
        np.testing.assert_allclose(got, row[..., total - got.shape[-1] : total], rtol=0, atol=1e-13)
        assert not row[..., : total - got.shape[-1]].any()  # of what is dropped
    assert kv.position == 11


@each_step
@each_left
@pytest.mark.parametrize("K", [1, 3, 6])
def test_gradients_of_steps_equal_those_of_the_full_forward(engine, steps, left, K):
    q, k, v, do = problem(K=K)
    _, cache = attention(q, k, v, mask=masks.window(left, 0), engine=engine)
    want = attention_vjp(cache, do)[:3]
    got = backward(*forward(q, k, v, steps, left=left, engine=engine), split(do, steps))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-11)


@each_step
@pytest.mark.parametrize("left", [None, 2])
def test_steps_match_torch(steps, left):
    q, k, v, do = problem()
    leaves = [oracles.tensor(x) for x in (q, k, v)]
    i, j = np.arange(11)[:, None], np.arange(11)
    mask = (j <= i) & (i - j <= (11 if left is None else left))
    want, *_ = oracles.attention(*leaves, None, mask=mask, scale=None)
    done, kv = forward(q, k, v, steps, left=left)
    np.testing.assert_allclose(np.concatenate([o for o, *_ in done], axis=-2), want.detach(), rtol=0, atol=1e-13)
    got = backward(done, kv, split(do, steps))
    for g, w in zip(got, oracles.gradients([want], [do], leaves), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-11)


@each_step
@each_left
def test_the_position_of_a_cache_is_that_for_rotary(steps, left):
    """Queries and keys rotated step by step, where `position` says they stand; what is dropped moves no other."""
    q, k, v, do = problem(D=6)
    freqs, whole = frequencies(6), table(np.arange(11), frequencies(6))
    (q_all, q_cache), (k_all, k_cache) = rotate(q, rotary=whole), rotate(k, rotary=whole)
    want, cache = attention(q_all, k_all, v, mask=masks.window(left, 0))
    dq, dk, *_ = attention_vjp(cache, do)
    want_dq, want_dk = rotate_vjp(q_cache, dq)[0], rotate_vjp(k_cache, dk)[0]

    kv, done, rotated = empty(k, v), [], []
    for q_t, k_t, v_t in zip(*(split(x, steps) for x in (q, k, v)), strict=True):
        part = table(kv.position + np.arange(q_t.shape[-2]), freqs)
        (q_t, q_cache), (k_t, k_cache) = rotate(q_t, rotary=part), rotate(k_t, rotary=part)
        kv, appended = append(kv, k_t, v_t, left=left)
        o, attended = attention(q_t, kv.keys, kv.values, mask=step_mask(kv, q_t.shape[-2], left=left))
        done.append((o, appended, attended))
        rotated.append((q_cache, k_cache))
    np.testing.assert_allclose(np.concatenate([o for o, *_ in done], axis=-2), want, rtol=0, atol=1e-13)
    dq, dk, _ = (split(g, steps) for g in backward(done, kv, split(do, steps)))
    for t, (q_cache, k_cache) in enumerate(rotated):
        rows = slice(sum(steps[:t]), sum(steps[: t + 1]))
        np.testing.assert_allclose(rotate_vjp(q_cache, dq[t])[0], want_dq[..., rows, :], rtol=0, atol=1e-11)
        np.testing.assert_allclose(rotate_vjp(k_cache, dk[t])[0], want_dk[..., rows, :], rtol=0, atol=1e-11)


def test_attention_without_a_head_axis():
    q, k, v, do = (x[0, 0] for x in problem(H=1, K=1))
    want, cache = attention(q, k, v, mask=masks.causal())
    done, kv = forward(q, k, v, [3, 5, 2, 1])
    np.testing.assert_allclose(np.concatenate([o for o, *_ in done]), want, rtol=0, atol=1e-13)
    for g, w in zip(backward(done, kv, split(do, [3, 5, 2, 1])), attention_vjp(cache, do)[:3], strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-11)


# ── the pair ─────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def appends(draw_):
    batch = draw_(st.lists(st.integers(0, 3), max_size=2))
    K, N, T, D, E = (draw_(st.integers(0, n)) for n in (3, 5, 5, 5, 7))
    left = draw_(st.none() | st.integers(0, 7))
    return draw((*batch, K, N, D), (*batch, K, N, E), (*batch, K, T, D), (*batch, K, T, E)), left


@given(appends())
def test_append_is_concatenation(case):
    (keys, values, k, v), left = case
    kv, _ = append(KVCache(keys, values, 29), k, v, left=left)
    N = keys.shape[-2]
    kept = N if left is None else min(N, left)
    assert np.array_equal(kv.keys, np.concatenate([keys[..., N - kept :, :], k], axis=-2))
    assert np.array_equal(kv.values, np.concatenate([values[..., N - kept :, :], v], axis=-2))
    assert kv.position == 29 + k.shape[-2]


@given(appends())
def test_append_keeps_the_protocol(case):
    inputs, left = case

    def f(keys, values, k, v):
        kv, cache = append(KVCache(keys, values, 29), k, v, left=left)
        return np.concatenate([kv.keys.ravel(), kv.values.ravel()]), (*cache, kv.keys, kv.values)

    def f_vjp(cache, dy):
        *cache, keys, values = cache
        dkeys, dvalues = np.split(dy, [keys.size])
        dkv, dk, dv = append_vjp(AppendCache(*cache), (dkeys.reshape(keys.shape), dvalues.reshape(values.shape)))
        return dkv.keys, dkv.values, dk, dv

    check_vjp(f, f_vjp, tuple(inputs))


def test_what_is_dropped_has_no_gradient():
    keys, values, k, v = draw((3, 7, 5), (3, 7, 2), (3, 2, 5), (3, 2, 2))
    kv, cache = append(KVCache(keys, values, 7), k, v, left=4)
    dkv, dk, dv = append_vjp(cache, KVCache(kv.keys, kv.values, None))
    assert dkv.position is None
    assert not dkv.keys[:, :3].any()
    assert not dkv.values[:, :3].any()
    assert np.array_equal(dkv.keys[:, 3:], keys[:, 3:])
    assert np.array_equal(dkv.values[:, 3:], values[:, 3:])
    assert np.array_equal(dk, k)
    assert np.array_equal(dv, v)


@pytest.mark.parametrize("left", [0, 1, 4])
def test_a_window_keeps_what_the_next_query_attends(left):
    k, v = draw((3, 23, 5), (3, 23, 2))
    kv = empty(k, v)
    for t in range(23):
        kv, _ = append(kv, k[:, t : t + 1], v[:, t : t + 1], left=left)
        assert np.array_equal(kv.keys, k[:, max(t - left, 0) : t + 1])
        assert np.array_equal(kv.values, v[:, max(t - left, 0) : t + 1])
        assert kv.position == t + 1
        assert masks.dense(step_mask(kv, 1, left=left), 1, kv.keys.shape[-2], k).all()


@given(st.integers(0, 7), st.integers(0, 7), st.none() | st.integers(0, 9))
def test_the_mask_is_the_last_rows_of_the_full_one(N, T, left):
    kv = KVCache(*draw((N + T, 5), (N + T, 2)), N + T)
    want = masks.dense(masks.window(left, 0), N + T, N + T, kv.keys)[N:]
    assert np.array_equal(masks.dense(step_mask(kv, T, left=left), T, N + T, kv.keys), want)


@pytest.mark.parametrize("left", [None, 2])
def test_every_array_library_gives_the_same(xp, left):
    arrays = draw((2, 3, 5, 4), (2, 3, 5, 7), (2, 3, 1, 4), (2, 3, 1, 7))
    results = []
    for to, back in ((np.array, np.asarray), (xp.to, xp.back)):
        k, v, k_t, v_t = (to(x) for x in arrays)
        kv, _ = append(empty(k, v), k, v, left=left)
        for _ in range(3):
            kv, cache = append(kv, k_t, v_t, left=left)
        (past_k, past_v, _), dk, dv = append_vjp(cache, kv[:2])
        assert {type(x) for x in (*kv[:2], past_k, past_v, dk, dv)} == {type(k)}
        results.append([back(x) for x in (*kv[:2], past_k, past_v, dk, dv)])
    for got, want in zip(*results, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.complex128])
def test_dtype_in_is_dtype_out(dtype):
    k, v = draw((3, 5, 4), (3, 5, 7), dtype=dtype)
    kv, cache = append(append(empty(k, v), k, v)[0], k, v, left=3)
    (dkeys, dvalues, _), dk, dv = append_vjp(cache, kv)
    assert {x.dtype for x in (kv.keys, kv.values, dkeys, dvalues, dk, dv)} == {np.dtype(dtype)}
    assert np.array_equal(kv.keys, np.concatenate([k[:, 2:], k], axis=-2))


def test_strided_and_read_only_arrays_are_arrays_like_others(xp):
    k, v = draw((4, 11, 3, 2), (7, 11, 3, 2))
    k, v = k.transpose(3, 2, 1, 0)[..., ::-1], v.transpose(3, 2, 1, 0)[:, :, ::-1]
    kv, plain = empty(xp.to(k), xp.to(v)), empty(k, v)
    for k_t, v_t in zip(split(k, [4, 1, 6]), split(v, [4, 1, 6]), strict=True):
        kv, _ = append(kv, xp.to(k_t), xp.to(v_t))
        plain, _ = append(plain, k_t, v_t)
    assert np.array_equal(xp.back(kv.keys), k)
    assert np.array_equal(plain.keys, k)
    assert np.array_equal(plain.values, v)


def test_torch_tensors_go_through_with_their_own_gradients():
    k, v = (oracles.tensor(x) for x in draw((3, 5, 4), (3, 5, 7)))
    kv = empty(k, v)
    for t in range(5):
        kv, _ = append(kv, k[:, t : t + 1], v[:, t : t + 1], left=3)
    ((kv.keys**2).sum() + kv.values.sum()).backward()
    assert torch.equal(k.grad[:, 1:], 2 * k.detach()[:, 1:])
    assert not k.grad[:, :1].any()
    assert v.grad[:, 1:].eq(1).all()


def test_jax_takes_the_pair_as_it_is():
    import jax

    past, fresh = draw((3, 5, 4), (3, 5, 7)), draw((3, 2, 4), (3, 2, 7), seed=1)
    with jax.enable_x64(True):

        def plain(kv, k, v):
            return append(kv, k, v, left=4)

        def loss(f, keys, values, k, v):
            kv = f(f(KVCache(keys, values, 5), k, v), 2 * k, 3 * v)
            return (kv.keys**3).sum() + (kv.values**2).sum() + kv.position

        ours = jax.custom_vjp(lambda *a: plain(*a)[0])
        ours.defvjp(plain, append_vjp)
        arrays = [jax.numpy.asarray(x) for x in (*past, *fresh)]
        got = jax.jit(jax.grad(lambda *a: loss(ours, *a), argnums=(0, 1, 2, 3)))(*arrays)
        want = jax.grad(lambda *a: loss(lambda *b: plain(*b)[0], *a), argnums=(0, 1, 2, 3))(*arrays)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-13)


def test_the_cache_holds_shapes_alone():
    k, v = draw((3, 5, 4), (3, 5, 7))
    _, cache = append(KVCache(k, v, 5), k, v, left=2)
    assert [x.shape for x in cache] == [(3, 5, 0), (3, 5, 0), (3, 7, 4, 0), (3, 7, 7, 0)]
    assert all(x.base is None or x.base.size == 0 for x in cache)


# ── no value changes ─────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), st.none() | st.integers(0, 4)), max_size=40))
@example([(0, 1, None)] * 20)  # many branches from one value
@example([(n, 1, None) for n in range(20)] + [(n, 1, None) for n in range(20)])  # a second life for each value
@example([(n, 1, 3) for n in range(20)] + [(n, 1, 3) for n in range(20)])
def test_a_tree_of_appends_shows_what_concatenation_shows(story):
    """Each step picks any value there is, also one that was appended to before. In the end all show their tokens."""
    shapes = (2, 0, 3), (2, 0, 1)
    values = [(empty(*draw(*shapes)), *draw(*shapes), 0)]
    for n, (pick, T, left) in enumerate(story):
        kv, keys, rows, total = values[pick % len(values)]
        k, v = draw((2, T, 3), (2, T, 1), seed=n)
        first = 0 if left is None else max(keys.shape[-2] - left, 0)
        want = np.concatenate([keys[:, first:], k], axis=1), np.concatenate([rows[:, first:], v], axis=1), total + T
        values.append((append(kv, k, v, left=left)[0], *want))
        k[...], v[...] = np.nan, np.nan  # whose buffers are the caller's
    for kv, keys, rows, total in values:
        assert np.array_equal(kv.keys, keys)
        assert np.array_equal(kv.values, rows)
        assert kv.position == total


def test_two_branches_share_the_past_and_not_the_rest():
    k, v = draw((3, 9, 4), (3, 9, 7))
    old, _ = append(empty(k, v), k, v)
    one, _ = append(old, k[:, :2], v[:, :2])
    two, _ = append(old, k[:, 2:4], v[:, 2:4])
    longer, _ = append(one, k[:, 4:6], v[:, 4:6])
    assert np.shares_memory(old.keys, one.keys)
    assert np.shares_memory(one.keys, longer.keys)
    assert not np.shares_memory(one.keys, two.keys)
    assert np.array_equal(one.keys[:, 9:], k[:, :2])
    assert np.array_equal(two.keys[:, 9:], k[:, 2:4])
    assert np.array_equal(longer.values, np.concatenate([v, v[:, :2], v[:, 4:6]], axis=1))


@pytest.fixture
def often():
    """Threads alternate as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("left", [None, 3])
def test_threads_that_append_to_one_value_have_their_own(left):
    workers, rounds = 8, 60
    k, v = draw((2, 5, 3), (2, 5, 1))
    barrier, failures = threading.Barrier(workers), []
    olds = [append(empty(k, v, capacity=64), k, v)[0] for _ in range(rounds)]

    def work(me):
        for old in olds:
            barrier.wait()
            kv, fill = old, []
            for t in range(7):
                fill.append(100 * me + t)
                kv, _ = append(kv, np.full((2, 1, 3), 100.0 * me + t), np.full((2, 1, 1), 100.0 * me + t), left=left)
            held = min(len(fill), kv.keys.shape[1])
            if not all((x[:, -held:] == np.array(fill[-held:])[:, None]).all() for x in kv[:2]):
                failures.append((me, kv))

    threads = [threading.Thread(target=work, args=(n + 1,)) for n in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(np.array_equal(old.keys, k) and np.array_equal(old.values, v) for old in olds)


def test_only_one_of_two_threads_takes_the_spare_rows(monkeypatch):
    """Each waits for the other between its look and its taking."""
    k, v = draw((2, 5, 3), (2, 5, 1))
    old, _ = append(empty(k, v), k, v)
    barrier, looks, made = threading.Barrier(2), [], [None, None]

    class Slow(dict):
        def get(self, key):
            found = super().get(key)
            barrier.wait(timeout=60)
            looks.append(found)
            return found

    def work(me):
        made[me], _ = append(old, me * ones, me * ones[..., :1])

    monkeypatch.setattr(BUFFERS, "_rooms", Slow(BUFFERS._rooms))
    ones = np.ones((2, 1, 3))
    threads = [threading.Thread(target=work, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looks) == 4
    assert None not in looks
    for me, kv in enumerate(made):
        assert np.array_equal(kv.keys, np.concatenate([k, me * ones], axis=1))
        assert np.array_equal(kv.values, np.concatenate([v, me * ones[..., :1]], axis=1))


@pytest.mark.parametrize(
    "other",
    [
        lambda kv: kv._replace(keys=-kv.keys),
        lambda kv: kv._replace(keys=kv.keys[..., ::-1, :]),
        lambda kv: kv._replace(keys=kv.keys[..., :-1, :], values=kv.values[..., :-1, :]),
        lambda kv: KVCache(*(x[np.array([1, 0])] for x in kv[:2]), kv.position),  # beams in another order
        lambda kv: KVCache(kv.keys, kv.keys, kv.position),
        copy.deepcopy,
        lambda kv: pickle.loads(pickle.dumps(kv)),
    ],
    ids=["negated", "reversed", "shortened", "reordered", "one array twice", "deep copy", "pickle"],
)
def test_a_value_pieced_together_shows_its_own_rows(other):
    k, v = draw((2, 5, 3), (2, 5, 3))
    kv, _ = append(empty(k, v), k, v)
    made = other(kv)
    want = np.concatenate([made.keys, k[:, :1]], axis=1), np.concatenate([made.values, v[:, :1]], axis=1)
    first, _ = append(made, k[:, :1], v[:, :1])
    append(made, k[:, 1:2], v[:, 1:2])
    append(kv, k[:, 2:3], v[:, 2:3])
    assert np.array_equal(first.keys, want[0])
    assert np.array_equal(first.values, want[1])
    assert np.array_equal(kv.keys, k)


def test_arrays_of_the_caller_are_never_written_to():
    whole, v = draw((3, 9, 4), (3, 9, 7))
    before = whole.copy()
    kv = KVCache(whole[:, :5], v[:, :5], 5)  # a view with rows behind it that are somebody's
    for t in range(3):
        kv, _ = append(kv, np.ones((3, 1, 4)), v[:, t : t + 1])
    assert np.array_equal(whole, before)


def test_what_is_held_cannot_be_written_to():
    k, v = draw((3, 5, 4), (3, 5, 7))
    kv, _ = append(empty(k, v), k, v)
    for x in kv[:2]:
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0


def test_tokens_from_the_buffer_itself_may_be_appended_to_it():
    k, v = draw((3, 5, 4), (3, 5, 7))
    kv, _ = append(empty(k, v), k, v)
    twice, _ = append(kv, kv.keys[:, 1:4], kv.values[:, 1:4])
    assert np.array_equal(twice.keys, np.concatenate([k, k[:, 1:4]], axis=1))


def test_an_interrupted_append_changes_nothing(monkeypatch):
    k, v = draw((3, 5, 4), (3, 5, 7))
    kv, _ = append(empty(k, v), k, v)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BUFFERS, "_shown", stop)  # the rows are written by now
        with pytest.raises(KeyboardInterrupt):
            append(kv, -k, -v)
    for sign in (2, 3):
        again, _ = append(kv, sign * k, sign * v)
        assert np.array_equal(again.keys, np.concatenate([k, sign * k], axis=1))
        assert np.array_equal(again.values, np.concatenate([v, sign * v], axis=1))


def test_spare_rows_of_a_view_that_is_gone_are_not_taken():
    """Should an interrupt ever keep an entry from going, an array that got the same id must not write there."""
    k, v, buffer = draw((3, 5, 4), (3, 5, 7), (3, 20, 4))
    BUFFERS._rooms[id(k)] = BUFFERS._Room(lambda: None, buffer, 5)
    try:
        kv, _ = append(KVCache(k, v, 5), -k, -v)
    finally:
        del BUFFERS._rooms[id(k)]
    assert np.array_equal(kv.keys, np.concatenate([k, -k], axis=1))
    assert not np.shares_memory(kv.keys, buffer)


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────


def rows_copied(steps, left=None, capacity=0):
    """How many rows of keys `append` has moved, besides the new ones; and the rows of every buffer that it made."""
    k, v = draw((1, sum(steps), 1), (1, sum(steps), 1))
    kv, copied, buffers = empty(k, v, capacity=capacity), 0, []
    for k_t, v_t in zip(split(k, steps), split(v, steps), strict=True):
        before = kv.keys
        kv, _ = append(kv, k_t, v_t, left=left)
        if kv.keys.base is not before.base:
            copied += kv.keys.shape[1] - k_t.shape[1]
            buffers.append(kv.keys.base.shape[1])
    return copied, buffers


def test_a_token_costs_a_constant_number_of_copied_rows():
    copied, buffers = rows_copied([1] * 4096)
    assert copied <= 2 * 4096
    assert buffers == [2 * (2**i - 1) for i in range(1, 13)]  # twice what was needed, each time


@pytest.mark.parametrize("left", [0, 1, 31, 100])
@pytest.mark.parametrize("T", [1, 2, 17, 51, 64, 300])
def test_a_window_costs_constant_copied_rows_and_memory(left, T):
    copied, buffers = rows_copied([T] * (2048 // T), left=left)
    assert copied <= 2 * 2048
    assert max(buffers) <= max(left + T, 2 * (left + 1))


def test_a_long_prompt_is_given_up_for_a_short_window():
    _, buffers = rows_copied([500, 1, 1, 1], left=7)
    assert buffers == [500, 16]


def test_with_capacity_nothing_is_copied():
    assert rows_copied([40, 1, 1, 22], capacity=64) == (0, [])
    assert rows_copied([40, 1, 1, 22, 1], capacity=64) == (64, [130])


def test_buffers_go_with_their_values():
    k, v = draw((3, 5, 4), (3, 5, 7))
    gc.collect()
    before = len(BUFFERS._rooms)
    kv, _ = append(empty(k, v), k, v)
    for _ in range(9):
        kv, cache = append(kv, k, v)
    assert len(BUFFERS._rooms) == before + 2  # of the last value alone
    buffer = weakref.ref(kv.keys.base)
    assert cache is not None
    del kv
    gc.collect()
    assert len(BUFFERS._rooms) == before
    assert buffer() is None


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

KEYS, VALUES, K_NEW, V_NEW = draw((2, 3, 5, 4), (2, 3, 5, 7), (2, 3, 1, 4), (2, 3, 1, 7))
HELD = KVCache(KEYS, VALUES, 5)


@pytest.mark.parametrize(
    ("kv", "k", "v", "error", "message"),
    [
        ((KEYS, VALUES, 5), K_NEW, V_NEW, TypeError, "kv must be a KVCache of funcmha.kv_cache, got tuple"),
        (HELD, K_NEW.tolist(), V_NEW, TypeError, "k must be an array, got list"),
        (HELD, K_NEW, None, TypeError, "v must be an array, got NoneType"),
        (HELD._replace(keys=None), K_NEW, V_NEW, TypeError, r"kv\.keys must be an array, got NoneType"),
        (HELD, K_NEW.astype("f4"), V_NEW, TypeError, r"k must have dtype float64 as kv\.keys has, got float32"),
        (HELD, K_NEW, V_NEW.astype(int), TypeError, "v must have a dtype of .*, got int64"),
        (HELD, K_NEW[..., :3], V_NEW, ValueError, r"k must be \(..., K, T, D\) with .*D=4 as in kv\.keys, got"),
        (HELD, K_NEW, V_NEW[..., :4], ValueError, r"v must be \(..., K, T, E\) with .*E=7 as in kv\.values"),
        (HELD, K_NEW[:, :1], V_NEW[:, :1], ValueError, r"k must be .*K=3 as in kv\.keys, .* got \(2, 1, 1, 4\)"),
        (HELD, K_NEW, V_NEW[:, :1], ValueError, r"v must be .* with .*K=3 as in kv\.keys"),
        (HELD, K_NEW[:1], V_NEW[:1], ValueError, r"k must be .* with ...=\(2,\) as in kv\.keys"),
        (HELD, K_NEW, np.ones((2, 3, 2, 7)), ValueError, r"v must be .* with .*T=1 as in k"),
        (HELD, K_NEW[0, 0, 0], V_NEW, ValueError, r"k must be \(..., K, T, D\) with .*, got \(4,\)"),
        (HELD._replace(values=VALUES[:, :, 1:]), K_NEW, V_NEW, ValueError, r"kv\.values must be .*N=5 as in kv\.keys"),
        (
            HELD._replace(position=4),
            K_NEW,
            V_NEW,
            ValueError,
            r"kv\.position must be at least N=5 as in kv\.keys, got 4",
        ),
        (
            HELD._replace(position=None),
            K_NEW,
            V_NEW,
            TypeError,
            r"kv\.position must be an int, got None of type NoneType",
        ),
    ],
)
def test_append_refuses(kv, k, v, error, message):
    with pytest.raises(error, match=message):
        append(kv, k, v)


def test_append_refuses_a_mixture_of_libraries():
    import jax

    with jax.enable_x64(True), pytest.raises(TypeError, match=r"k must be a NumPy array as kv\.keys is, got a JAX"):
        append(HELD, jax.numpy.asarray(K_NEW), V_NEW)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: append(HELD, K_NEW, V_NEW, left=-1), ValueError, "left must be at least 0, or None for no bound, got"),
        (
            lambda: append(HELD, K_NEW, V_NEW, left=2.0),
            TypeError,
            "left must be an int, or None for no bound, got 2.0 of type float",
        ),
        (lambda: step_mask(HELD, 6), ValueError, r"T must be at most N=5 as in kv\.keys, .*, got 6"),
        (lambda: step_mask(HELD, -1), ValueError, "T must be at least 0, got -1"),
        (lambda: step_mask(HELD, True), TypeError, "T must be an int, got True of type bool"),
        (lambda: step_mask(HELD, 1, left=-1), ValueError, "left must be at least 0"),
        (lambda: step_mask(KEYS, 1), TypeError, "kv must be a KVCache of funcmha.kv_cache, got ndarray"),
        (lambda: empty(KEYS, VALUES[:1]), ValueError, r"v must be \(..., K, T, E\) with ...=\(2,\) as in k"),
        (lambda: empty(KEYS, VALUES.astype("f4")), TypeError, "v must have dtype float64 as k has, got float32"),
        (lambda: empty(KEYS, VALUES, capacity=-1), ValueError, "capacity must be at least 0, got -1"),
        (lambda: empty(KEYS, VALUES, capacity=1.0), TypeError, "capacity must be an int, got 1.0 of type float"),
    ],
)
def test_empty_and_step_mask_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("dkeys", "dvalues", "error", "message"),
    [
        (KEYS, np.ones((2, 3, 6, 7)), ValueError, r"dkeys must be \(..., K, N', D\) = \(2, 3, 6, 4\) as the output is"),
        (np.ones((2, 3, 6, 4)), VALUES, ValueError, r"dvalues must be \(..., K, N', E\) = \(2, 3, 6, 7\)"),
        (np.ones((2, 3, 6, 4), "f4"), np.ones((2, 3, 6, 7)), TypeError, "dkeys must have dtype float64"),
        (np.ones((2, 3, 6, 4)), None, TypeError, "dvalues must be an array, got NoneType"),
    ],
)
def test_append_vjp_refuses(dkeys, dvalues, error, message):
    _, cache = append(HELD, K_NEW, V_NEW)
    with pytest.raises(error, match=message):
        append_vjp(cache, (dkeys, dvalues))
