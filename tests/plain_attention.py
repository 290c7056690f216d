"""Attention and its gradient in plain NumPy, without funcmha: what tests/published.py plants faults in.

It computes in the dtype of its arrays, in tiles of keys in the gradient, whose weights come from the scores again.
"""

import numpy as np

TILE = 32


def forward(
    q, k, v, *, bias=None, mask=None, sink=None, bias_k=None, bias_v=None, causal=False, window=None, scale=None,
    softcap=None,
):  # fmt: skip
    """(o, lse, weights), saved     q (B, H, T, D)   k (B, K, S, D)   v (B, K, S, E)"""
    scale = q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    softcap = None if softcap is None else q.dtype.type(softcap)
    group, appended = q.shape[1] // k.shape[1], bias_k is not None
    if appended:
        k, v = append(k, bias_k), append(v, bias_v)
        mask = None if mask is None else np.pad(mask, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
    kh, vh = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    allowed = np.ones((1, 1, q.shape[2], k.shape[2]), bool)
    distance = np.arange(k.shape[2]) - np.arange(q.shape[2])[:, None]
    if causal:
        allowed = allowed & (distance <= 0)
    if window is not None:
        allowed = allowed & (distance >= -window[0]) & (distance <= window[1])
    if mask is not None:
        allowed = allowed & mask
    if appended:
        allowed = allowed | (np.arange(k.shape[2]) == k.shape[2] - 1)

    s = (scale * q) @ kh.mT
    c = s if softcap is None else softcap * np.tanh(s / softcap)
    z = c if bias is None else c + bias
    scores = np.where(allowed, z, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    top = top if sink is None else np.maximum(top, sink[:, None, None])
    top = np.where(np.isneginf(top), q.dtype.type(0), top)
    e_sink = np.zeros_like(top) if sink is None else np.exp(sink[:, None, None] - top)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True) + e_sink
    empty = total == 0
    total = np.where(empty, q.dtype.type(1), total)
    lse = np.where(empty, -np.inf, top + np.log(total))[..., 0].astype(q.dtype)
    p = e / total
    o = p @ vh
    return (o, lse, p), (q, kh, vh, bias, sink, scores, top, total, lse, c, o, scale, softcap, group, appended)


def backward(saved, do, *, dlse=None, dweights=None):
    """dq, dk, dv, dbias, dsink, dbias_k, dbias_v"""
    q, kh, vh, bias, sink, scores, top, total, lse, c, o, scale, softcap, group, appended = saved  # noqa: RUF059 — for what is planted
    do = do.astype(q.dtype)
    delta = (do * o).sum(-1, keepdims=True)
    if dweights is not None:
        delta = delta + (np.exp(scores - top) / total * dweights).sum(-1, keepdims=True)
    along = -delta
    if dlse is not None:
        along = along + dlse[..., None]
    dq, dk, dv, dz = np.zeros_like(q), np.zeros_like(kh), np.zeros_like(vh), np.zeros_like(scores)
    for start in range(0, kh.shape[2], TILE):
        tile = slice(start, start + TILE)
        p = np.exp(scores[..., tile] - top) / total
        dp = do @ vh[:, :, tile].mT
        if dweights is not None:
            dp = dp + dweights[..., tile]
        ds = p * (dp + along)
        dz[..., tile] = ds
        if softcap is not None:
            ds = ds * (1 - (c[..., tile] / softcap) ** 2)
        dq += scale * (ds @ kh[:, :, tile])
        dk[:, :, tile] = ds.mT @ (scale * q)
        dv[:, :, tile] = p.mT @ do
    dk, dv = (a.reshape(a.shape[0], a.shape[1] // group, group, *a.shape[2:]).sum(2) for a in (dk, dv))
    dbias = None if bias is None else unbroadcast(dz, bias.shape)
    dsink = None
    if sink is not None:
        dsink = (np.exp(sink[:, None, None] - top) / total * along).sum((0, 2, 3))
    dbias_k = dbias_v = None
    if appended:
        dk, dbias_k, dv, dbias_v = dk[:, :, :-1], dk[:, :, -1].sum(0), dv[:, :, :-1], dv[:, :, -1].sum(0)
    return dq, dk, dv, dbias, dsink, dbias_k, dbias_v


def append(a, row):
    """The key or value after the others of each sample"""
    return np.concatenate([a, np.broadcast_to(row[:, None], (*a.shape[:2], 1, a.shape[-1]))], axis=2)


def unbroadcast(a, shape):
    """The sum over the axes along which `shape` was repeated"""
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and a.shape[i] != 1)
    return a.sum(axes, keepdims=True)
