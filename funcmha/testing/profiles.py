"""How an implementation computes: what it rounds on its way, and by which formulas its gradient goes.

    attention_bounds(q, k, v, None, do, dtype="float16", arithmetic="flash")
    attention_bounds(q, k, v, None, do, dtype="bfloat16", arithmetic=FLASH._replace(stored=("p", "dv"), tile=64))

A flash-style kernel in half precision sums in float32, and rounds the weights, the gradient of the scores and the
output to half between its products. It is off by hundreds of the bounds of what is rounded once, and it is right.
"""

from typing import Any, NamedTuple

__all__ = ["FLASH", "STRICT", "Profile"]

STORED = {
    "p": "the weights, before their product with the values, and in the gradient with the cotangent",
    "ds": "the gradient of the scores, before its products with the keys and with the queries",
    "o": "the output, from which the gradient makes δ = Σ do ⊙ o",
    "lse": "the log-sum-exp, from which the gradient recomputes the weights",
    "dk": "the part of a query head in dk, before the sum over the group, and the running sum after each tile",
    "dv": "the same of dv",
    "sums": "the accumulator of every product",
}


class Profile(NamedTuple):
    stored: tuple[
        str, ...
    ] = ()  # of STORED: what is rounded to the dtype of the inputs where that is float16 or bfloat16
    recomputed: bool = False  # the gradient takes the weights from exp(score − lse)
    centred: bool = True  # the gradient keeps the digits of saturated rows, as p (dp − δ) as it stands does not
    base2: bool = False  # weights are powers of two: a score times log₂ e is rounded once more, and so is lse
    tile: int | None = None  # queries to a tile, after each of which the running sums of dk and dv are stored


STRICT = Profile()  # rounded once, at the end
FLASH = Profile(("p", "ds", "o"), recomputed=True, centred=False, base2=True)  # FlashAttention 2, section 3
PROFILES = {"strict": STRICT, "flash": FLASH}


def profile_of(arithmetic: Any) -> Profile:
    """The profile of this name, or the one given; TypeError or ValueError, with what there is, for any other."""
    named = PROFILES.get(arithmetic) if isinstance(arithmetic, str) else arithmetic
    if not isinstance(named, Profile):
        known = ", ".join(map(repr, PROFILES))
        raise TypeError(
            f"arithmetic must be one of {known}, or a Profile of funcmha.testing.profiles, got {arithmetic!r}"
        )
    unknown = [name for name in named.stored if name not in STORED]
    if unknown or isinstance(named.stored, str):
        raise ValueError(f"stored must be a tuple out of {', '.join(map(repr, STORED))}, got {named.stored!r}")
    if named.tile is not None and (not isinstance(named.tile, int) or named.tile < 1 or isinstance(named.tile, bool)):
        raise ValueError(f"tile must be a number of queries, at least 1, or None, got {named.tile!r}")
    return named
