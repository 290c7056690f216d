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

import dataclasses
import zlib
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from funcmha import biases, dropout, masks, norms, params, rotary, tree
from funcmha._arrays import Array, read_only

__all__ = ["AttentionProblem", "MhaProblem", "attention_problems", "mha_problems"]

MASKS = (
    "none", "causal", "window", "lengths", "padding", "segments", "dense", "heads", "empty rows", "intersection",
    "prefix", "chunks", "complement",
)  # fmt: skip
BIASES = (
    "none", "... H T S", "... 1 T S", "... H 1 S", "... H T 1", "... 1 1 S", "H T S", "1 T S", "T S", "1 S", "T 1", "S",
)  # fmt: skip
RELATIVE = ("... H T+S-1", "1 T+S-1", "T+S-1")  # biases that are a `RelativeBias`
FAMILIES: dict[str, Any] = {  # what becomes of normal q, k and v
    "normal": lambda q, k, v: (q, k, v),
    "ties": lambda q, k, v: (np.round(q), np.round(k), np.round(v)),
    "equal keys": lambda q, k, v: (q, k[..., :1, :] + np.zeros_like(k), v),
    "one hot": lambda q, k, v: (*(np.where(a == np.max(a, axis=-1, keepdims=True), 1.0, 0.0) for a in (q, k)), v),
    "offset values": lambda q, k, v: (q, k, v + 100),
    "powers of two": lambda *x: (np.copysign(2.0 ** np.round(2 * a), a) for a in x),
    "tiny": lambda *x: (1e-20 * a for a in x),
    "zeros": lambda *x: map(np.zeros_like, x),
}
LAYOUTS: dict[str, Any] = {
    "contiguous": lambda a: a,
    "fortran": np.asfortranarray,
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "repeated": lambda a: np.broadcast_to(a[:1, ...], a.shape),
}
NORMS = {"none": None, "rms": norms.RMSNorm(), "l2": norms.L2Norm(), "layer": norms.LayerNorm()}
ROTARIES = ("none", "half of all", "half of some", "interleaved of all", "interleaved of some")
GAINS = (1e-8, 1e-3, 1.0, 10.0, 1e2, 1e4)


def drawn(default: Any, choices: Any) -> Any:
    """A field with a default, which is drawn from a sequence or a strategy."""
    strategy = choices if isinstance(choices, st.SearchStrategy) else st.sampled_from([*choices])
    return dataclasses.field(default=default, metadata={"drawn": strategy})


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of `funcmha.attention`."""

    batch: tuple[int, ...] = drawn((2,), [(), (1,), (2,), (3,), (2, 3), (0,)])
    T: int = drawn(5, [0, 1, 2, 3, 5, 13, 64, 65])
    S: int = drawn(7, [0, 1, 2, 3, 7, 17, 64, 65])
    K: int = drawn(2, st.integers(1, 3))
    G: int = drawn(3, st.integers(1, 3))
    D: int = drawn(11, [1, 2, 3, 8, 11])
    E: int = drawn(13, [1, 2, 5, 8, 13])
    mask: str = drawn("none", MASKS)
    bias: str = drawn("none", BIASES)  # or one of RELATIVE: its axes, where 1 is broadcast
    sink: bool = False
    rate: float = drawn(0.0, [0.0, 0.0, 0.3])  # of dropout
    seeded: bool = False  # whether dropout is drawn from a seed
    scale: float | None = drawn(None, [None, None, 1.0, 0.0, -0.5])
    softcap: float | None = None
    per_head: bool = False  # whether scale and softcap, where given, are one for each head
    gain: float = drawn(1.0, GAINS)  # multiplies the queries, and so the scores
    family: str = drawn("normal", FAMILIES)
    layout: str = drawn("contiguous", LAYOUTS)  # in memory
    seed: int = drawn(0, st.integers(0, 2**32 - 1))

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
        sink = read_only(self._normal("sink.w", "H").astype(dtype)) if self.sink else None
        return *self._inputs(dtype, q="... H T D", k="... K S D", v="... K S E"), self._bias(dtype), sink

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
        keep = read_only(self._rng("keep").random((*self.batch, self.H, self.T, self.keys)) >= self.rate)
        return dropout.masked(keep, self.rate)

    def _each_head(self, x: float | None, step: float) -> Any:
        """x, or one number per head, each larger by `step` times x; so that no two of scale / softcap are equal."""
        return x if x is None or not self.per_head else tuple(x * (1 + step * h) for h in range(self.H))

    def cotangents(self, dtype: Any) -> tuple[Array, Array, Array]:
        """do (..., H, T, E)   dweights (..., H, T, keys)   dlse (..., H, T)"""
        axes = {"do": "... H T E", "dweights": "... H T keys", "dlse": "... H T"}
        do, dweights, dlse = (self._lay(self._normal(*item), dtype) for item in axes.items())
        return do, dweights, dlse

    def _rng(self, name: str) -> Any:
        """A random stream per name, so that no array depends on which others are drawn."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _normal(self, name: str, axes: str) -> np.ndarray:
        """Standard normal numbers along `axes`, such as "... H T D"; their sizes are attributes."""
        sizes = {"...": self.batch, "1": (1,), "T+S-1": (max(self.T + self.S - 1, 0),)}
        shape = [n for axis in axes.split() for n in (sizes[axis] if axis in sizes else (getattr(self, axis),))]
        return np.asarray(self._rng(name).standard_normal(shape))

    def _bias(self, dtype: Any) -> Array:
        if self.bias == "none":
            return None
        bias = self._lay(self._normal("bias", self.bias), dtype)
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
            "dense": read_only(rng.random((*batch, 1, T, S)) < 0.7),
            "heads": read_only(rng.random((*batch, self.H, T, S)) < 0.7),
            "empty rows": read_only(rng.random((T, 1)) < 0.5),
            "intersection": masks.causal(S - T) & lengths,
            "prefix": masks.prefix(rng.integers(0, S + 1, batch), S - T),
            "chunks": masks.causal(S - T) & masks.chunks(3, S - T),
            "complement": ~masks.segments(*ids),
        }[self.mask]

    def _inputs(self, dtype: Any, **axes: str) -> list[Array]:
        """Arrays of the family, the first times the gain."""
        first, *rest = FAMILIES[self.family](*(self._normal(*item) for item in axes.items()))
        return [self._lay(a, dtype) for a in (self.gain * first, *rest)]

    def _lay(self, a: np.ndarray, dtype: Any) -> Array:
        """`a` in `dtype` and in the layout of the problem, read-only."""
        return read_only(LAYOUTS[self.layout](a.astype(dtype)))


@dataclass(frozen=True)
class MhaProblem(AttentionProblem):
    """Inputs of `funcmha.mha`: an attention problem with projections around it."""

    Cq: int = drawn(17, [1, 2, 7, 12])
    Ck: int = drawn(19, [1, 3, 7, 12])
    Cv: int = drawn(23, [1, 5, 7, 12])
    O: int = drawn(29, [1, 2, 11, 12])
    biases: bool = drawn(True, st.booleans())
    bias_kv: bool = drawn(False, st.booleans())
    zero_attn: bool = drawn(False, st.booleans())
    qk_norm: str = "none"  # one of NORMS
    rotary: str = "none"  # one of ROTARIES

    @property
    def keys(self) -> int:
        """The number of keys: S, and those that are appended."""
        return self.S + self.bias_kv + self.zero_attn

    def inputs(self, dtype: Any) -> tuple[Any, ...]:
        """params   query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   bias or None"""
        inputs = self._inputs(dtype, query="... T Cq", key="... S Ck", value="... S Cv")
        return self._params(dtype), *inputs, self._bias(dtype)

    def static(self) -> dict[str, Any]:
        """The keyword arguments: mask, scale, dropout, zero_attn, and softcap, qk_norm and rotary if there are any."""
        more = {"qk_norm": NORMS[self.qk_norm], "rotary": self._rotary()}
        return super().static() | {"zero_attn": self.zero_attn} | {name: x for name, x in more.items() if x is not None}

    def _rotary(self) -> Any:
        """Tables of queries and keys that rotate half of the features, or all but an odd one."""
        if self.rotary == "none":
            return None
        width = self.D // 2 * 2 if "all" in self.rotary else self.D // 4 * 2
        pairs: Any = "half" if "half" in self.rotary else "interleaved"
        places = (np.arange(n) + start for n, start in ((self.T, 3), (self.S, 0)))
        q, k = (rotary.table(p, rotary.frequencies(width), pairs=pairs) for p in places)
        return q, k

    def cotangents(self, dtype: Any) -> tuple[Array, Array, Array]:
        """dy (..., T, O)   dweights (..., H, T, keys)   dlse (..., H, T)"""
        _, dweights, dlse = super().cotangents(dtype)
        return self._lay(self._normal("dy", "... T O"), dtype), dweights, dlse

    def _params(self, dtype: Any) -> params.Params:
        """Weights that preserve the size of their inputs, and biases of size 1."""
        leaves = {}
        for leaf, axes in params.SPEC.items():
            if self._has(leaf):
                a = self._normal(leaf, axes)
                fan_in = max(prod(a.shape[1:] if leaf == "out_proj.w" else a.shape[2:]), 1)
                leaves[leaf] = read_only((fan_in**-0.5 * a).astype(dtype))
        return tree.unflatten(leaves)

    def _has(self, leaf: str) -> bool:
        group, _, name = leaf.partition(".")
        if group in ("q_norm", "k_norm"):
            return self.qk_norm == "layer" or (self.qk_norm == "rms" and name == "w")
        if group in ("bias_kv", "sink"):
            return self.bias_kv if group == "bias_kv" else self.sink
        return name == "w" or self.biases


# Not drawn unless asked for: attention_problems(**MODERN), mha_problems(**MODERN, **MODERN_MHA)
MODERN: dict[str, Any] = {
    "bias": st.sampled_from([*BIASES, *RELATIVE]),
    "sink": st.booleans(),
    "seeded": st.booleans(),
    "softcap": st.sampled_from([None, None, 0.5, 30.0]),
    "per_head": st.booleans(),
}
MODERN_MHA: dict[str, Any] = {"qk_norm": st.sampled_from([*NORMS]), "rotary": st.sampled_from(ROTARIES)}


def attention_problems(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[AttentionProblem]:
    """Any `AttentionProblem`; a field named here is drawn from the strategy given for it."""
    return st.builds(AttentionProblem, **(_strategies(AttentionProblem) | fields))


def mha_problems(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[MhaProblem]:
    """Any `MhaProblem`; a field named here is drawn from the strategy given for it."""
    return st.builds(MhaProblem, **(_strategies(MhaProblem) | fields)).filter(_agrees)


def _strategies(problem: type[AttentionProblem]) -> dict[str, Any]:
    return {field.name: field.metadata["drawn"] for field in dataclasses.fields(problem) if field.metadata}


def _agrees(problem: MhaProblem) -> bool:
    """Appended keys have no position, so no `RelativeBias` is allowed beside them."""
    return "T+S-1" not in problem.bias or not (problem.bias_kv or problem.zero_attn)
