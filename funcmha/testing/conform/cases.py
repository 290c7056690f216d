"""The input families: which problems each feature is tried on.

Every family is there for published bugs that no other input shows: rows that attend nothing, sizes 0, sizes that are no
multiple of a tile, wide values, grouped heads, random cotangents without causal, cotangents of lse and of the weights,
sinks of ±20, biases that alone ask for a gradient, saturated rows, masks said twice, batches.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from .conventions import fitted
from .implementation import Implementation
from .problems import BIASES, Problem

SEEDS = 1000  # more than any problem has: the seed of a run counts in these


@dataclass(frozen=True)
class Case:
    feature: str
    problem: Problem
    dtype: str

    @property
    def name(self) -> str:
        """The feature, the dtype and a hash of the problem, by which it is found again."""
        return f"{slug(self.feature)}/{self.dtype}/{zlib.crc32(repr(self.problem).encode()):08x}"

    @property
    def replay(self) -> str:
        """The arguments of the command line that run it."""
        seed = self.problem.seed // SEEDS
        return f"--case {self.name}" + (f" --seed {seed}" if seed else "")

    def told(self) -> str:
        """The problem, without what is as usual."""
        usual = Problem()
        differ = [f for f in fields(Problem) if getattr(self.problem, f.name) != getattr(usual, f.name)]
        return f"Problem({', '.join(f'{f.name}={getattr(self.problem, f.name)!r}' for f in differ)})"


def slug(feature: str) -> str:
    """The name of a feature as a shell takes it"""
    return feature.replace(",", "").replace(" ", "-")


# By family: E empty, Z size 0, N sizes, X widths, G groups, C cotangents, L lse and weights, K sinks, B bias and mask,
# S saturated, M said twice, R repeats and batches
FEATURES: dict[str, tuple[Problem, ...]] = {
    "plain": (Problem(), Problem(T=33, S=20, seed=1), Problem(B=1, H=1, K=1, T=64, S=64, D=32, E=32, seed=2)),
    "sizes": tuple(
        Problem(H=1, K=1, T=T, S=S, seed=n)
        for n, (T, S) in enumerate([(1, 1), (1, 65), (65, 1), (31, 63), (63, 129), (100, 127), (127, 100), (129, 33)])
    ),
    "causal": tuple(
        Problem(T=T, S=S, H=2, K=2, causal=True, seed=n)
        for n, (T, S) in enumerate([(13, 13), (13, 29), (65, 65), (1, 17), (100, 127), (129, 129)])
    ),
    "causal, fewer keys": (Problem(T=29, S=13, causal=True), Problem(T=70, S=33, causal=True, seed=1)),
    "window": (
        Problem(T=29, S=29, window=(3, 0)),
        Problem(T=65, S=70, window=(9, 4), seed=1),
        Problem(T=40, S=40, window=(5, 0), causal=True, seed=2),
        Problem(T=29, S=29, window=(0, 0), seed=3),
    ),
    "mask": (Problem(mask="dense"), Problem(mask="heads", T=33, S=65, seed=1), Problem(mask="keys", seed=2)),
    "mask and causal": (Problem(mask="dense", causal=True, T=29, S=29), Problem(mask="keys", causal=True, T=17, S=17)),
    "empty rows": (
        Problem(mask="some rows"),
        Problem(mask="samples", T=20),
        Problem(mask="some rows", T=65, S=65, causal=True, seed=1),
    ),
    "size 0": (Problem(T=0), Problem(S=0), Problem(B=0)),
    "widths": (
        Problem(D=16, E=24),
        Problem(D=40, E=8, seed=1),
        Problem(D=80, E=80, seed=2),
        Problem(D=128, E=128, T=33, S=33, seed=3),
        Problem(D=256, E=256, B=3, H=1, K=1, T=17, S=33, seed=4),
        Problem(D=192, E=128, H=1, K=1, T=17, S=33, seed=5),
    ),
    "grouped heads": (
        Problem(H=4, K=2),
        Problem(H=6, K=2, T=33, seed=1),
        Problem(H=4, K=1, causal=True, T=17, S=17, seed=2),
        Problem(H=6, K=3, B=1, S=65, seed=3),
    ),
    "scale": (Problem(scale=0.3), Problem(scale=1.0, seed=1), Problem(scale=0.0), Problem(scale=-0.5, seed=2)),
    "soft cap": (
        Problem(softcap=2.0, gain=4.0),
        Problem(softcap=30.0, gain=20.0, seed=1),
        Problem(softcap=2.0, gain=4.0, bias="B H T S", seed=2),
        Problem(softcap=2.0, gain=4.0, causal=True, seed=3),
    ),
    "bias": (
        *(Problem(bias=axes, seed=n) for n, axes in enumerate(BIASES)),
        Problem(bias="1 H T S", causal=True, T=17, S=17),
    ),
    "bias alone": (
        Problem(bias="B H T S", only="bias"),
        Problem(bias="1 H T S", only="bias", seed=1),
        Problem(bias="B 1 T S", only="bias", causal=True, seed=2),
    ),
    "lowest bias": (
        Problem(bias="1 1 T S", lowest=True, T=13, S=33),
        Problem(bias="B H T S", lowest=True, S=65, seed=1),
    ),
    "lse": (
        Problem(cotangents=("lse",)),
        Problem(cotangents=("o", "lse"), T=33, S=65, seed=1),
        Problem(cotangents=("o", "lse"), causal=True, T=17, S=17, seed=2),
        Problem(cotangents=("o", "lse"), mask="dense", seed=3),
    ),
    "weights": (Problem(cotangents=("weights",)), Problem(cotangents=("o", "weights"), T=33, causal=True, seed=1)),
    "sink": (
        Problem(sink=0.0),
        Problem(sink=20.0, T=33, seed=1),
        Problem(sink=-20.0, seed=2),
        Problem(sink=0.0, causal=True, T=17, S=17, seed=3),
        Problem(sink=0.0, H=6, K=2, D=80, E=24, seed=4),
        Problem(sink=1.0, T=1, S=33, seed=5),
    ),
    "appended key": (
        Problem(appended=True),
        Problem(appended=True, causal=True, T=17, S=17, seed=1),
        Problem(appended=True, mask="dense", T=33, seed=2),
        Problem(appended=True, causal=True, T=13, S=29, seed=3),
    ),
    "sink and lse": (Problem(sink=0.0, cotangents=("o", "lse")), Problem(sink=3.0, cotangents=("lse",), seed=1)),
    "saturated": (
        Problem(gain=1e3),
        Problem(gain=30.0, T=33, S=65, seed=1),
        Problem(gain=30.0, offset=100.0, causal=True, T=17, S=17, seed=2),
    ),
    "deep scores": (Problem(shift=-1e5, T=9, S=21), Problem(shift=-1e3, gain=1.0, T=33, S=33, seed=1)),
    "offset values": (Problem(offset=100.0), Problem(offset=100.0, T=65, S=65, causal=True, seed=1)),
    "batch": (Problem(B=5, H=2, K=2, T=17, S=19), Problem(B=3, H=2, K=2, causal=True, T=33, S=33, seed=1)),
}
LARGE: dict[str, tuple[Problem, ...]] = {
    "large": (
        Problem(B=1, H=2, K=1, T=1025, S=1023, D=64, E=64, causal=True),
        Problem(B=1, H=1, K=1, T=2048, S=2048, D=128, E=128, seed=1),
        Problem(B=1, H=1, K=1, T=3, S=16384, D=64, E=64, seed=2),
    )
}


def needs(problem: Problem) -> set[str]:
    """The options that a forward must take for this problem."""
    by_option = {"bias": problem.bias, "sink": problem.sink, "window": problem.window, "scale": problem.scale}
    by_option |= {"softcap": problem.softcap, "causal": problem.causal or None}
    by_option |= dict.fromkeys(("bias_k", "bias_v"), problem.appended or None)
    by_option |= {"mask": None if problem.mask == "none" else True}
    return {name for name, value in by_option.items() if value is not None}


def cases(impl: Implementation, *, seed: int = 0, large: bool = False) -> Iterator[tuple[Case, str | None]]:
    """Every case whose options the forward takes, and why it is not run, or None

    The first case of every feature comes before the second of any.
    """
    features = FEATURES | (LARGE if large else {})
    for n in range(max(map(len, features.values()))):
        for dtype in impl.dtypes:
            for feature, problems in features.items():
                for problem in problems[n : n + 1]:
                    if _takes(impl, problem):
                        yield from _fitted(
                            impl, Case(feature, replace(problem, seed=problem.seed + SEEDS * seed), dtype)
                        )


def _takes(impl: Implementation, problem: Problem) -> bool:
    judged = problem.only is None or problem.only in impl.differentiates
    takes = {*impl.options, *(["causal"] if impl.always_causal else [])}
    return judged and needs(problem) <= takes and {*problem.cotangents} <= {*impl.returned}


def _fitted(impl: Implementation, case: Case) -> Iterator[tuple[Case, str | None]]:
    """The case, with sizes that the limits allow if what it is about remains"""
    problem = case.problem
    if problem.causal and problem.T > problem.S and impl.causal == "bottom-right" and impl.empty_row == "undefined":
        return
    if problem.softcap is not None and problem.bias is not None and impl.cap_order != "scale cap bias mask":
        return
    why = impl.refuses(**problem.sizes())
    if why is None and not ("B" not in impl.layout.split() and problem.B != 1):
        yield case, None
        return
    other = fitted(impl, problem)
    if other is None or _about(case.feature, problem) != _about(case.feature, other):
        yield case, why or "B=1 alone, as the layout has no axis B"
    else:
        yield replace(case, problem=other), None


def _about(feature: str, problem: Problem) -> tuple[object, ...]:
    """What must stay of a problem for it to be a case of its feature."""
    of: dict[str, tuple[object, ...]] = {
        "size 0": (problem.T == 0, problem.S == 0, problem.B == 0),
        "grouped heads": (problem.H // max(problem.K, 1),),
        "widths": (problem.D, problem.E),
        "sizes": (problem.T, problem.S),
        "causal, fewer keys": (problem.T > problem.S,),
        "batch": (problem.B > 1,),
        "large": (problem.T, problem.S),
    }
    return of.get(feature, ())
