"""The keys and values of the past as a value, to which those of new tokens are appended.

    kv = empty(k, v)                                                   # of no tokens yet; once for each layer
    table = rotary.table(kv.position + np.arange(T), frequencies(64))      # where the T new tokens stand
    kv, cache = append(kv, k, v)                                       # a new value: the old one stays what it was
    o, _ = attention(q, kv.keys, kv.values, mask=step_mask(kv, T))     # of the T new queries
    dkv, dk, dv = append_vjp(cache, (dkeys, dvalues))                  # the gradient reaches the past

One call serves a prompt, one token and several. With `left` the past is a sliding window, and the rest is dropped.

NumPy and CuPy arrays grow in place where nobody can tell: what is held is a view of a buffer with room behind it, and
the first append to a view has that room to itself. Any later append to it, a second beam say, finds the room taken and
copies. So a token costs O(1) copied rows, whatever the length of the past, and no value ever changes. Arrays of other
libraries are joined by copying.

Axes: N keys held, N' after an append, T new tokens, K key/value heads, D key width, E value width; `...` is batch.
"""

from numbers import Integral
from typing import Any, NamedTuple
from weakref import ref

from funcmha import _check, masks
from funcmha._arrays import Array, dtype_name, full, is_array, namespace, outline, own, unset, writes
from funcmha.masks import Mask

# ── the value ────────────────────────────────────────────────────────────────────────────────────────────────────


class KVCache(NamedTuple):
    keys: Array  # (..., K, N, D)
    values: Array  # (..., K, N, E)
    position: int  # tokens appended so far: the next stands at this position, and the first held at position − N


def empty(k: Array, v: Array, /, *, capacity: int = 0) -> KVCache:
    """keys, values of no tokens        k (..., K, T, D)   v (..., K, T, E)   →   (..., K, 0, D), (..., K, 0, E)

    For tokens like those of k and v, whose numbers are not read. With `capacity`, so many tokens have room from the
    start, and nothing is copied until they are there; without, room is made by doubling.
    """
    _check.one_dtype([("k", k), ("v", v)])
    axes, head = _check.Axes(), _head(k)
    axes("k", k, head + "T D")
    axes("v", v, head + "T E")
    capacity = _check.integer("capacity", capacity, 0)
    keys, values = ((_reserved(x, capacity) if writes(x) else full(_sized(x, 0), 0.0, x)) for x in (k, v))
    return KVCache(keys, values, 0)


# ── append ───────────────────────────────────────────────────────────────────────────────────────────────────────


class AppendCache(NamedTuple):
    past: Array  # (..., K, N, 0): of what was held, nothing but its shape
    new: Array  # (..., K, T, 0)
    keys: Array  # (..., K, N', D, 0): of what is held now, nothing but its shape
    values: Array  # (..., K, N', E, 0)


def append(kv: KVCache, k: Array, v: Array, /, *, left: int | None = None) -> tuple[KVCache, AppendCache]:
    """keys' = [the last n of keys; k]   values' = [the last n of values; v]   n = min(N, left)
    keys (..., K, N, D)   values (..., K, N, E)   k (..., K, T, D)   v (..., K, T, E)   →   (..., K, N', D and E)

    left    as in `masks.window`: each new query attends itself and so many before. What none of them attends, and
            none after them, is dropped: T = 1 leaves left + 1 keys at most, a prompt all its own until the next append.
            None is no bound, and drops nothing

    Arrays without a head axis serve attention without one. `kv` and all values before it stay as they are, and may be
    appended to again, also by several threads. A buffer has at most twice the rows that it was made for, and lives as
    long as any value in it. Amortised, a token costs at most three copied rows, its own included.
    Raises TypeError for mixed dtypes or libraries, ValueError for shapes that do not fit or a negative `left`.
    """
    return appended(kv, k, v, check_append(kv, k, v, left))


def append_vjp(cache: AppendCache, dkv: KVCache | tuple[Array, Array], /) -> tuple[KVCache, Array, Array]:
    """dkv, dk, dv      dkeys = [0; the first n of dkeys']   dk = the rest of dkeys'      and so for values

    from the cotangents of keys' (..., K, N', D) and values' (..., K, N', E), as a pair or as a `KVCache`. What was
    dropped has gradient 0, and `position` has none: it is None. Needs shapes alone.
    """
    _check.cache(cache, AppendCache, "append")
    past, new, keys, values = cache
    dkeys, dvalues = two_cotangents(dkv)
    _check.cotangent("dkeys", dkeys, keys.shape[:-1], keys, "... K N' D")
    _check.cotangent("dvalues", dvalues, values.shape[:-1], values, "... K N' E")
    N, kept = past.shape[-2], keys.shape[-3] - new.shape[-2]
    dpast_k, dk = _split(dkeys, N, kept)
    dpast_v, dv = _split(dvalues, N, kept)
    return KVCache(dpast_k, dpast_v, None), dk, dv  # type: ignore[arg-type]  # an integer has no gradient


def appended(kv: KVCache, k: Array, v: Array, left: int | None) -> tuple[KVCache, AppendCache]:
    """`append`, of arguments that are checked"""
    N, T = kv.keys.shape[-2], k.shape[-2]
    kept = N if left is None else min(N, left)
    keys, values = _joined(kv.keys, k, kept, left), _joined(kv.values, v, kept, left)
    past, new = full((*_sized(k, N)[:-1], 0), 0.0, k), full((*k.shape[:-1], 0), 0.0, k)
    cache = AppendCache(past, new, outline(keys), outline(values))
    return KVCache(keys, values, kv.position + T), cache


def _split(dx: Array, N: int, kept: int) -> tuple[Array, Array]:
    """dx (..., N', ·)   →   (..., N, ·), with 0 for what was dropped, and (..., T, ·)"""
    dpast, dnew = (own(part, part) for part in (dx[..., :kept, :], dx[..., kept:, :]))
    if kept < N:
        dpast = namespace(dx).concat([full(_sized(dx, N - kept), 0.0, dx), dpast], axis=-2)
    return dpast, dnew


def step_mask(kv: KVCache, T: int, /, *, left: int | None = None) -> Mask:
    """j ≤ i + N − T, and i + N − T − left ≤ j        the mask of the last T tokens of `kv` as queries: (T, N)

    For the `kv` that has them already, with the `left` that it was appended with. Raises ValueError unless it holds T.
    """
    check_kv(kv)
    N, T = _check.arrays(("kv.keys", kv.keys, "... N D"))["N"], _check.integer("T", T, 0)
    if T > N:
        raise ValueError(f"T must be at most N={N} as in kv.keys, which holds the new tokens already, got {T}")
    return masks.window(left, 0, N - T)


# ── room ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Room(NamedTuple):
    """The rows of a buffer that no value shows yet: those from `start` on, behind the view that may take them."""

    view: Any  # a weak reference to it
    buffer: Array  # (..., capacity, ·)
    start: int


# From the id of a view. An entry goes when its room is taken or its view dies, so that what is here decides whether an
# append copies, and never what it returns. It is not in `KVCache`, which so holds arrays alone: one that was mapped,
# pickled or pieced together has other arrays, which have no room, and cannot show another's rows.
_rooms: dict[int, _Room] = {}


def _joined(x: Array, new: Array, kept: int, left: int | None) -> Array:
    """[the last `kept` rows of x; new]"""
    N, T = x.shape[-2], new.shape[-2]
    if not writes(x):
        return namespace(x).concat([x[..., N - kept :, :], new], axis=-2)
    room = _taken(x, T)
    if room is None:
        buffer, stop = unset(_sized(x, _capacity(kept + T, left)), x), kept
        buffer[..., :kept, :] = x[..., N - kept :, :]
    else:
        buffer, stop = room.buffer, room.start
    buffer[..., stop : stop + T, :] = new
    return _shown(buffer, stop - kept, stop + T)


def _taken(x: Array, T: int) -> _Room | None:
    """The room behind x if it has T rows, for this caller alone: of all threads, one gets an entry that it pops."""
    room = _rooms.get(id(x))
    if room is None or room.view() is not x or room.start + T > room.buffer.shape[-2]:
        return None
    return _rooms.pop(id(x), None)


def _shown(buffer: Array, start: int, stop: int) -> Array:
    """buffer[..., start:stop, :], which has the room behind it; read-only where the library can say so"""
    x = buffer[..., start:stop, :]
    if hasattr(x, "flags") and hasattr(x.flags, "writeable"):  # not in CuPy
        x.flags.writeable = False

    def drop(_: Any, key: int = id(x), rooms: dict[int, _Room] = _rooms) -> None:
        rooms.pop(key, None)

    _rooms[id(x)] = _Room(ref(x, drop), buffer, stop)
    return x


def _reserved(x: Array, capacity: int) -> Array:
    return _shown(unset(_sized(x, capacity), x), 0, 0)


def _capacity(needed: int, left: int | None) -> int:
    """Twice what is needed; of a window, twice what it keeps, and a prompt that has more goes with the next append."""
    return 2 * needed if left is None else max(needed, 2 * min(needed, left + 1))


def _sized(x: Array, n: int) -> tuple[int, ...]:
    """The shape of x (..., T, ·) with n for T"""
    return (*x.shape[:-2], n, x.shape[-1])


# ── argument checks ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_append(kv: Any, k: Array, v: Array, left: int | None) -> int | None:
    """The arguments of `append`: `left` as a Python int or None."""
    check_kv(kv)
    _check.one_dtype([("kv.keys", kv.keys), ("kv.values", kv.values), ("k", k), ("v", v)])
    axes, head = _check.Axes(), _head(kv.keys)
    axes("kv.keys", kv.keys, head + "N D")
    axes("kv.values", kv.values, head + "N E")
    axes("k", k, head + "T D")
    axes("v", v, head + "T E")
    check_position(kv, axes["N"])
    return masks.window(left, 0).left  # which checks it


def check_position(kv: KVCache, N: int) -> None:
    """What is held was appended."""
    if isinstance(kv.position, Integral) and kv.position < N:
        raise ValueError(f"kv.position must be at least N={N} as in kv.keys, got {kv.position}")


def two_cotangents(dkv: Any) -> tuple[Array, Array]:
    """Those of keys' and values', of a `KVCache` or a pair."""
    if not isinstance(dkv, tuple) or len(dkv) not in (2, len(KVCache._fields)):
        raise TypeError(f"dkv must be a KVCache, or a pair of dkeys and dvalues, got {type(dkv).__name__}")
    return dkv[0], dkv[1]


def check_kv(kv: Any) -> None:
    """A `KVCache`, whatever its arrays are."""
    if not isinstance(kv, KVCache):
        of_step = hasattr(kv, "attention") or (isinstance(kv, tuple) and KVCache in map(type, kv))
        instead = ": write (y, kv), cache = step(params, x)" if of_step else ""
        raise TypeError(f"kv must be a KVCache of funcmha.kv_cache, got {type(kv).__name__}{instead}")
    position: Any = kv.position
    traced = is_array(position) and position.ndim == 0 and dtype_name(position).startswith(("int", "uint"))  # by JAX
    if not (traced or isinstance(position, Integral)) or isinstance(position, bool):
        raise TypeError(f"kv.position must be an int, got {kv.position!r} of type {type(kv.position).__name__}")


def _head(x: Array) -> str:
    return "... K " if x.ndim > 2 else ""
