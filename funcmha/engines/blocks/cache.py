"""What attention by blocks keeps.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Bias, Options
from funcmha._arrays import Array
from funcmha.dropout import Masked, Seeded
from funcmha.engines.plan import Plan
from funcmha.masks import Dense, Intersection, Mask, intersection
from funcmha.ops import per_head


class Host(NamedTuple):
    """What is known without a look at an array of q's library."""

    mask: Mask | None  # what NumPy's arrays say of it
    dropout: Seeded | None
    keys: int  # S
    plan: Plan
    half: str | None  # whose products the forward took


class Rest(NamedTuple):
    """What the derivatives need beside q, k and v."""

    bias: Bias  # broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    o: Array  # (..., H, T, E)
    row_sum: Array  # (..., H, T), Σ exp(z − row_max), 0 where no key is attended
    row_max: Array  # (..., H, T), the largest score or the sink, 0 where that is −∞
    mask: Mask | None  # the rest of the mask: an array outside NumPy
    keep: Masked | None
    scale: Array | float  # of every head, or (H, 1, 1)
    softcap: Array | float | None  # of every head, or (H, 1, 1)
    host: Any  # a `Host`; for arrays outside NumPy the key of a dict: JAX would trace the numbers of a leaf

    @property
    def known(self) -> Host:
        """The `Host`"""
        (known,) = self.host if isinstance(self.host, dict) else (self.host,)
        return known  # type: ignore[no-any-return]

    @property
    def whole_mask(self) -> Mask | None:
        """Both parts of the mask"""
        return intersection(self.known.mask, self.mask)

    @property
    def dropout(self) -> Masked | Seeded | None:
        """Of either kind"""
        return self.known.dropout if self.keep is None else self.keep

    @property
    def num_keys(self) -> int:
        """S"""
        return self.known.keys

    @property
    def plan(self) -> Plan:
        """That of the engine"""
        return self.known.plan

    def with_qkv(self, q: Array, k: Array, v: Array) -> "AttentionCache":
        """The cache with these q, k and v"""
        return AttentionCache(q, k, v, self)

    def heads(self, h: slice) -> "Rest":
        """Of the query heads h, as views"""
        known = self.known
        known = known._replace(
            mask=None if known.mask is None else known.mask.heads(h.start, h.stop),
            dropout=None if known.dropout is None else known.dropout.heads(h),
        )
        scale, softcap = (a if a is None or isinstance(a, float) else a[h, ...] for a in (self.scale, self.softcap))
        return Rest(
            bias=None if self.bias is None else self.bias.heads(h),
            sink=None if self.sink is None else self.sink[h],
            o=self.o[..., h, :, :],
            row_sum=self.row_sum[..., h, :],
            row_max=self.row_max[..., h, :],
            mask=None if self.mask is None else self.mask.heads(h.start, h.stop),
            keep=None if self.keep is None else self.keep.heads(h),
            scale=scale,
            softcap=softcap,
            host={known: None} if isinstance(self.host, dict) else known,
        )


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at fully masked queries
    k: Array  # (..., K, S, D), 0 at unattended keys
    v: Array  # (..., K, S, E), 0 at unattended keys
    rest: Rest


def attended(cache: AttentionCache) -> tuple[Array, Array]:
    """Keys (..., H or 1, 1, S), or None for all, and queries (..., H, T, 1)"""
    (q, k, _, rest), mask = cache, cache.rest.whole_mask
    keys = None if mask is None else mask.attended_keys(q.shape[-2], k.shape[-2], q)
    return keys, (rest.row_sum != 0)[..., None]


def begun(q: Array, k: Array, bias: Bias, sink: Array, x: Options, plan: Plan, half: str | None) -> Rest:
    """The `Rest` before there is any row"""
    mask, outside = _by_place(x.mask, q, k.shape[-2])
    seeded, keep = (x.dropout, None) if isinstance(x.dropout, Seeded) else (None, x.dropout)
    host = Host(mask, seeded, k.shape[-2], plan, half)
    scale, softcap = per_head(x.scale, q), per_head(x.softcap, q)
    held = host if isinstance(q, np.ndarray) else {host: None}
    return Rest(bias, sink, None, None, None, outside, keep, scale, softcap, held)


def _by_place(mask: Mask | None, q: Array, S: int) -> tuple[Mask | None, Dense | None]:
    """The mask as two that both allow: what NumPy's arrays say, and an array outside NumPy"""
    if mask is None or mask.on_host:
        return mask, None
    parts = mask.parts if isinstance(mask, Intersection) else (mask,)
    outside: Any = intersection(*(part for part in parts if not part.on_host))
    if not isinstance(outside, Dense):
        outside = Dense(outside.dense(q.shape[-2], S, q))
    return intersection(*(part for part in parts if part.on_host)), outside
