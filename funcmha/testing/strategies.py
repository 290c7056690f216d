"""Hypothesis strategies for whole attention problems.

A problem is a small frozen dataclass of sizes and kinds with a seed from which its numbers are drawn: shrinking makes
the problem smaller, and its repr can be pasted into a test as it stands.

    @given(attention_problems(mask=st.just("causal")))  # any field can be given a strategy of its own
    def test_something(problem):
        q, k, v, bias, sink = problem.inputs("float32")
        o, cache = attention(q, k, v, bias, sink, **problem.static())

Every array is read-only. Axes: T queries, S keys, K key/value heads, G query heads to each, D query/key width, E value
width, Cq Ck Cv input widths, O output width.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from funcmha import biases, dropout, masks, norms, params, rotary, tree
from funcmha._arrays import Array

MASKS = ("none", "causal", "window", "lengths", "padding", "segments", "dense", "heads", "empty rows", "intersection")
BIASES = (
    "none",
    "... H T S",
    "... 1 T S",
    "... H 1 S",
    "... H T 1",
    "... 1 1 S",
    "H T S",
    "1 T S",
    "T S",
    "1 S",
    "T 1",
    "S",
)
RELATIVE = ("... H T+S-1", "1 T+S-1", "T+S-1")  # biases that are a `RelativeBias`
FAMILIES = ("normal", "ties", "equal keys", "one hot", "offset values", "powers of two", "tiny", "zeros")
NORMS = ("none", "rms", "l2", "layer")
ROTARIES = ("none", "half of all", "half of some", "interleaved of all", "interleaved of some")
LAYOUTS = ("contiguous", "fortran", "reversed", "strided", "repeated")
GAINS = (1e-8, 1e-3, 1.0, 10.0, 1e2, 1e4)


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of `funcmha.attention`."""

    batch: tuple[int, ...] = (2,)
    T: int = 5
    S: int = 7
    K: int = 2
    G: int = 3
    D: int = 11
    E: int = 13
    mask: str = "none"  # one of MASKS
    bias: str = "none"  # one of BIASES or RELATIVE: its axes, where 1 is broadcast
    sink: bool = False
    rate: float = 0.0  # of dropout
    seeded: bool = False  # whether dropout is drawn from a seed
    scale: float | None = None
    softcap: float | None = None
    per_head: bool = False  # whether scale and softcap, where given, are one for each head
    gain: float = 1.0  # multiplies the queries, and so the scores
    family: str = "normal"  # one of FAMILIES: the kind of values
    layout: str = "contiguous"  # one of LAYOUTS: their layout in memory
    seed: int = 0

    @property
    def H(self) -> int:  # noqa: N802 — an axis
        """Query heads."""
        return self.K * self.G

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.S

    def inputs(self, dtype: Any) -> tuple[Any, ...]:
        """q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   bias or None   sink (H,) or None"""
        q = self._normal("q", (*self.batch, self.H, self.T, self.D))
        k = self._normal("k", (*self.batch, self.K, self.S, self.D))
        v = self._normal("v", (*self.batch, self.K, self.S, self.E))
        sink = _frozen(self._normal("sink.w", (self.H,)).astype(dtype)) if self.sink else None
        return *(self._lay(a, dtype) for a in self._family(q, k, v)), self._bias(dtype), sink

    def static(self) -> dict[str, Any]:
        """The keyword arguments: mask, scale, dropout, and softcap if there is one."""
        static = {"mask": self._mask(), "scale": self._each_head(self.scale, 0.25)}
        static |= {} if self.softcap is None else {"softcap": self._each_head(self.softcap, 0.375)}
        return static | {"dropout": self._dropout()}

    def _dropout(self) -> dropout.Masked | dropout.Seeded | None:
        if not self.rate:
            return None
        if self.seeded:
            return dropout.seeded(self.seed, self.rate)
        keep = _frozen(self._rng("keep").random((*self.batch, self.H, self.T, self.keys)) >= self.rate)
        return dropout.masked(keep, self.rate)

    def _each_head(self, x: float | None, step: float) -> Any:
        """x, or one number per head, each larger by `step` times x; so that no two of scale / softcap are equal."""
        return x if x is None or not self.per_head else tuple(x * (1 + step * h) for h in range(self.H))

    def cotangents(self, dtype: Any) -> tuple[Array, Array, Array]:
        """do (..., H, T, E)   dweights (..., H, T, keys)   dlse (..., H, T)"""
        rows = (*self.batch, self.H, self.T)
        do, dweights = self._normal("do", (*rows, self.E)), self._normal("dweights", (*rows, self.keys))
        return self._lay(do, dtype), self._lay(dweights, dtype), self._lay(self._normal("dlse", rows), dtype)

    def _rng(self, name: str) -> Any:
        """A random stream per name, so that no array depends on which others are drawn."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _normal(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self._rng(name).standard_normal(shape))

    def _bias(self, dtype: Any) -> Array:
        if self.bias == "none":
            return None
        size = {"...": self.batch, "H": (self.H,), "T": (self.T,), "S": (self.S,), "1": (1,)}
        size["T+S-1"] = (max(self.T + self.S - 1, 0),)
        shape = tuple(n for axis in self.bias.split() for n in size[axis])
        bias = self._lay(self._normal("bias", shape), dtype)
        return biases.RelativeBias(bias) if "T+S-1" in self.bias else bias

    def _mask(self) -> Any:
        rng, batch, T, S = self._rng("mask"), self.batch, self.T, self.S
        lengths = masks.lengths(rng.integers(0, S + 1, batch))
        ids = [np.sort(rng.integers(0, 3, (*batch, n))) for n in (T, S)]
        return {
            "none": None,
            "causal": masks.causal(int(rng.integers(-2, 3))),
            "window": masks.window(int(rng.integers(0, 4)), int(rng.integers(0, 3)), S - T),
            "lengths": lengths,
            "padding": masks.padding(rng.random((*batch, S)) < 0.7),
            "segments": masks.segments(*ids),
            "dense": _frozen(rng.random((*batch, 1, T, S)) < 0.7),
            "heads": _frozen(rng.random((*batch, self.H, T, S)) < 0.7),
            "empty rows": _frozen(rng.random((T, 1)) < 0.5),
            "intersection": masks.causal(S - T) & lengths,
        }[self.mask]

    def _family(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values of the family from normal q, k and v, times the gain."""
        if self.family == "ties":
            q, k, v = np.round(q), np.round(k), np.round(v)
        elif self.family == "equal keys":
            k = k[..., :1, :] + np.zeros_like(k)
        elif self.family == "one hot":
            q, k = (np.where(a == np.max(a, axis=-1, keepdims=True), 1.0, 0.0) for a in (q, k))
        elif self.family == "offset values":
            v = v + 100
        elif self.family == "powers of two":
            q, k, v = (np.copysign(2.0 ** np.round(2 * a), a) for a in (q, k, v))
        elif self.family == "tiny":
            q, k, v = 1e-20 * q, 1e-20 * k, 1e-20 * v
        elif self.family == "zeros":
            q, k, v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        return self.gain * q, k, v

    def _lay(self, a: np.ndarray, dtype: Any) -> Array:
        """`a` in `dtype` and in the layout of the problem, read-only."""
        a = a.astype(dtype)
        if self.layout == "fortran":
            a = np.asfortranarray(a)
        elif self.layout == "reversed":
            a = np.flip(np.flip(a).copy())
        elif self.layout == "strided":
            a = np.repeat(a, 2, axis=-1)[..., ::2]
        elif self.layout == "repeated":
            a = np.broadcast_to(a[:1, ...], a.shape)
        return _frozen(a)


@dataclass(frozen=True)
class MhaProblem(AttentionProblem):
    """Inputs of `funcmha.mha`: an attention problem with projections around it."""

    Cq: int = 17
    Ck: int = 19
    Cv: int = 23
    O: int = 29
    biases: bool = True
    bias_kv: bool = False
    zero_attn: bool = False
    qk_norm: str = "none"  # one of NORMS
    turned: str = "none"  # one of ROTARIES

    @property
    def keys(self) -> int:
        """The number of keys: S, and those that are appended."""
        return self.S + self.bias_kv + self.zero_attn

    def inputs(self, dtype: Any) -> tuple[Any, ...]:
        """params   query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   bias or None"""
        query = self._normal("query", (*self.batch, self.T, self.Cq))
        key = self._normal("key", (*self.batch, self.S, self.Ck))
        value = self._normal("value", (*self.batch, self.S, self.Cv))
        arrays = (self._lay(a, dtype) for a in self._family(query, key, value))
        return self._params(dtype), *arrays, self._bias(dtype)

    def static(self) -> dict[str, Any]:
        """The keyword arguments: mask, scale, dropout, zero_attn, and softcap, qk_norm and rotary if there are any."""
        norm = {"none": None, "rms": norms.RMSNorm(), "l2": norms.L2Norm(), "layer": norms.LayerNorm()}[self.qk_norm]
        more = {"qk_norm": norm, "rotary": self._rotary()}
        return super().static() | {"zero_attn": self.zero_attn} | {name: x for name, x in more.items() if x is not None}

    def _rotary(self) -> Any:
        """Tables of queries and keys that rotate half of the features, or all but an odd one."""
        if self.turned == "none":
            return None
        width = self.D // 2 * 2 if "all" in self.turned else self.D // 4 * 2
        pairs: Any = "half" if "half" in self.turned else "interleaved"
        places = (np.arange(n) + start for n, start in ((self.T, 3), (self.S, 0)))
        q, k = (rotary.table(p, rotary.frequencies(width), pairs=pairs) for p in places)
        return q, k

    def cotangents(self, dtype: Any) -> tuple[Array, Array, Array]:
        """dy (..., T, O)   dweights (..., H, T, keys)   dlse (..., H, T)"""
        _, dweights, dlse = super().cotangents(dtype)
        return self._lay(self._normal("dy", (*self.batch, self.T, self.O)), dtype), dweights, dlse

    def _params(self, dtype: Any) -> params.Params:
        """Weights that preserve the size of their inputs, and biases of size 1."""
        leaves = {}
        for leaf, axes in params.SPEC.items():
            if self._has(leaf):
                shape = tuple(getattr(self, axis) for axis in axes.split())
                fan_in = max(np.prod(shape[1:] if leaf == "out_proj.w" else shape[2:]), 1)
                leaves[leaf] = _frozen((fan_in**-0.5 * self._normal(leaf, shape)).astype(dtype))
        return tree.unflatten(leaves)

    def _has(self, leaf: str) -> bool:
        group, _, name = leaf.partition(".")
        if group in ("q_norm", "k_norm"):
            return self.qk_norm == "layer" or (self.qk_norm == "rms" and name == "w")
        if group in ("bias_kv", "sink"):
            return self.bias_kv if group == "bias_kv" else self.sink
        return name == "w" or self.biases


def _frozen(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


_FIELDS: dict[str, Any] = {
    "batch": st.sampled_from([(), (1,), (2,), (3,), (2, 3), (0,)]),
    "T": st.sampled_from([0, 1, 2, 3, 5, 13, 64, 65]),
    "S": st.sampled_from([0, 1, 2, 3, 7, 17, 64, 65]),
    "K": st.integers(1, 3),
    "G": st.integers(1, 3),
    "D": st.sampled_from([1, 2, 3, 8, 11]),
    "E": st.sampled_from([1, 2, 5, 8, 13]),
    "mask": st.sampled_from(MASKS),
    "bias": st.sampled_from(BIASES),
    "rate": st.sampled_from([0.0, 0.0, 0.3]),
    "scale": st.sampled_from([None, None, 1.0, 0.0, -0.5]),
    "gain": st.sampled_from(GAINS),
    "family": st.sampled_from(FAMILIES),
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 2**32 - 1),
}
_MHA_FIELDS: dict[str, Any] = {
    "Cq": st.sampled_from([1, 2, 7, 12]),
    "Ck": st.sampled_from([1, 3, 7, 12]),
    "Cv": st.sampled_from([1, 5, 7, 12]),
    "O": st.sampled_from([1, 2, 11, 12]),
    "biases": st.booleans(),
    "bias_kv": st.booleans(),
    "zero_attn": st.booleans(),
}
# Not drawn unless asked for: attention_problems(**MODERN), mha_problems(**MODERN, **MODERN_MHA)
MODERN: dict[str, Any] = {
    "bias": st.sampled_from([*BIASES, *RELATIVE]),
    "sink": st.booleans(),
    "seeded": st.booleans(),
    "softcap": st.sampled_from([None, None, 0.5, 30.0]),
    "per_head": st.booleans(),
}
MODERN_MHA: dict[str, Any] = {"qk_norm": st.sampled_from(NORMS), "turned": st.sampled_from(ROTARIES)}


def attention_problems(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[AttentionProblem]:
    """Any `AttentionProblem`; a field named here is drawn from the strategy given for it."""
    return st.builds(AttentionProblem, **(_FIELDS | fields))


def mha_problems(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[MhaProblem]:
    """Any `MhaProblem`; a field named here is drawn from the strategy given for it."""
    return st.builds(MhaProblem, **(_FIELDS | _MHA_FIELDS | fields)).filter(_agrees)


def _agrees(problem: MhaProblem) -> bool:
    """Appended keys have no position, so no `RelativeBias` is allowed beside them."""
    return "T+S-1" not in problem.bias or not (problem.bias_kv or problem.zero_attn)
