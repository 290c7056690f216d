"""Check a gradient: by a complex step where the function is holomorphic, else by differences."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from .slope import RATIO, WINDOW, Slope, likely, slopes
from .structure import aligned, cast, is_floating, is_int, is_numpy, leaves, map_leaves, normal, require

STEP = 1e-30  # of the complex step: nothing is subtracted, so it may be this small
COMPLEX, DIFFERENCES = "complex step", "differences"
POINTS = 4  # at most so many are tried: differences must contradict a gradient at two or more
CLOSE, SURE = 1e-6, 1e-3  # relative errors up to which differences confirm the complex step


class Agreement(NamedTuple):
    """How a gradient was compared, and how well it agrees."""

    by: str  # "complex step", or "differences" where f is not holomorphic
    error: float  # |⟨dy, J d⟩ − ⟨Jᵀ dy, d⟩|
    allowed: float  # the largest error allowed


class Pair(NamedTuple):
    f: Callable[..., Any]
    f_vjp: Callable[..., Any]
    static: dict[str, Any]
    tolerance: float


class _Claim(NamedTuple):
    """What f_vjp says, for one direction and one cotangent."""

    slope: float  # ⟨Jᵀ dy, d⟩
    size: float  # Σ |Jᵀ dy| |d|
    allowed: float  # tolerance · size


class _Verdict(NamedTuple):
    by: str
    slope: float  # ⟨dy, J d⟩
    allowed: float
    claim: _Claim
    right: bool | None  # None where no derivative is to be seen


def check_gradient(pair: Pair, inputs: tuple[Any, ...], rng: Any) -> Agreement:
    """At the inputs; and beside them where differences are against the gradient, or can tell nothing"""
    against = []
    for _ in range(POINTS):
        found = _compare(pair, inputs, rng)
        if found.right:
            return Agreement(found.by, abs(found.slope - found.claim.slope), found.allowed)
        require(found.right is None or found.by == DIFFERENCES, _is_not_the_gradient(found))
        against += [found] if found.right is False else []
        inputs = tuple(map_leaves(lambda x: _nearby(x, rng), x) for x in inputs)
    require(len(against) < 2, _is_not_the_gradient(against[0] if against else found))
    raise ValueError("f_vjp cannot be checked: in float64 f has no derivative at these inputs, nor beside them")


def _is_not_the_gradient(found: _Verdict) -> str:
    claim, error = found.claim, abs(found.slope - found.claim.slope)
    of = claim.size if claim.size else 1.0
    why = "" if found.by == COMPLEX else ", by differences, as f is not holomorphic or takes no complex numbers"
    return (
        f"f_vjp is not the gradient: ⟨dy, J d⟩ = {found.slope:.17g} and ⟨Jᵀ dy, d⟩ = {claim.slope:.17g} differ by "
        f"{error / of:.2g} of the sum of magnitudes {claim.size:.3g}, and {found.allowed / of:.0e} is allowed{why}"
    )


def _compare(pair: Pair, inputs: tuple[Any, ...], rng: Any) -> _Verdict:
    """At one point, for a random direction d and a random cotangent dy"""
    d = list(leaves(map_leaves(lambda x: normal(x, rng), inputs)))
    y, cache = pair.f(*inputs, **pair.static)
    dy = map_leaves(lambda a: _cotangent(a, rng), y)
    grads = leaves(aligned(inputs, pair.f_vjp(cache, dy)))
    products = _joined(_product(e, g) for e, g in zip(d, grads, strict=True))
    size = float(np.abs(products).sum())
    claim = _Claim(float(products.sum()), size, pair.tolerance * size)

    def terms(t: float | complex) -> np.ndarray:
        """dy ⊙ f(inputs + t d)"""
        along = iter(d)
        ys, _ = pair.f(*map_leaves(lambda x: _moved(x, next(along), t), inputs), **pair.static)
        return _joined(_product(g, a) for g, a in zip(leaves(dy), leaves(ys), strict=True))

    return _judged(terms, claim, *_scales(inputs))


def _judged(terms: Callable[[Any], np.ndarray], claim: _Claim, large: float, small: float) -> _Verdict:
    """By the complex step where differences confirm it, and by them where they do not"""
    exact = _complex_step(terms, STEP)
    of = max(size for size in (0.0, claim.size, abs(exact)) if np.isfinite(size))
    found = _slopes(terms, large / 64, WINDOW)
    if any(_confirms(slope, exact, CLOSE * of) for slope in found) and abs(exact - claim.slope) <= claim.allowed:
        return _Verdict(COMPLEX, exact, claim.allowed, claim, True)
    known = likely(_slopes(terms, large, int(np.log(small / large) / np.log(RATIO)) + 20))
    if not known:
        return _Verdict(DIFFERENCES, np.nan, np.nan, claim, None)
    best, of = known[0], max([of, abs(known[0].value)])
    steps = best.flat and best.step < small / 64  # that may be meant to look smooth, as those of half precision
    if len(known) == 1 and not steps and _confirms(best, exact, SURE * of):
        spread = max(abs(_complex_step(terms, c * STEP) - exact) for c in (0.73, 1.37))
        allowed = claim.allowed if spread <= claim.allowed else 100 * spread  # f is complex64 on its way
        return _Verdict(COMPLEX, exact, allowed, claim, bool(abs(exact - claim.slope) <= allowed))
    vague = best.error > max(1e3 * best.rounding, max(abs(best.value), abs(claim.slope)) / 4)
    if vague and exact != 0 and abs(exact - claim.slope) <= claim.allowed:
        return _Verdict(COMPLEX, exact, claim.allowed, claim, True)  # to so many digits by no accident
    agree = [abs(slope.value - claim.slope) <= max(slope.error, claim.allowed) for slope in known]
    right: bool | None = bool(any(agree) if steps else agree[0] and not vague)
    if not right and (any(agree) or steps):
        right = None
    return _Verdict(DIFFERENCES, best.value, max(best.error, claim.allowed), claim, right)


def _confirms(slope: Slope, exact: float, most: float) -> bool:
    return bool(slope.steady and abs(slope.value - exact) <= slope.error <= most)


def _complex_step(terms: Callable[[Any], np.ndarray], h: float) -> float:
    """Im Σ terms(i h) / h; NaN where f takes no complex numbers"""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of discarded imaginary parts, say: differences will not confirm the rest
            return float(np.sum(np.imag(terms(1j * h)) / h))
    except Exception:
        return np.nan


def _slopes(terms: Callable[[Any], np.ndarray], step: float, n: int) -> list[Slope]:
    """By the windows of n steps, where f takes them."""

    def real(t: float) -> np.ndarray:
        try:
            return terms(t)
        except Exception:  # outside of what f is defined for
            return np.full(1, np.nan)

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return slopes(real, step, n)


# ── leaves ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def double(x: Any, grad: Any) -> Any:
    """In float64; a Python int that has a gradient as a float, and what has none as it is"""
    if is_floating(x):
        return cast(x, np.float64, x) if is_numpy(x) else x
    return float(x) if is_int(x) and is_floating(grad) else x


def _cotangent(y: Any, rng: Any) -> Any:
    """`normal`, and 0 where y is not finite, as the lse of a row without keys: it has no derivative"""
    dy = normal(y, rng)
    return dy if dy is None or np.all(np.isfinite(y)) else cast(np.where(np.isfinite(y), dy, 0), np.result_type(y), y)


def _moved(x: Any, d: Any, t: float | complex) -> Any:
    """x + t d"""
    if d is None:
        return x
    return cast(x + t * d, np.result_type(type(t), np.float64), x) if is_numpy(x) else x + t * float(d)


def _nearby(x: Any, rng: Any) -> Any:
    """x moved by a sixteenth of what is usual in it"""
    return _moved(x, normal(x, rng), _usual(x) / 16 if is_floating(x) else 0.0)


def _usual(x: Any) -> float:
    """The root mean square of what is finite in x, 1 if that is 0"""
    a = np.asarray(x)[np.isfinite(x)]
    most = float(np.max(np.abs(a), initial=0.0))
    return most * float(np.sqrt(np.mean((a / most) ** 2))) if most else 1.0


def _scales(inputs: Any) -> tuple[float, float]:
    """Of the inputs that are largest, 1 at least, and of those that are smallest"""
    sizes = [_usual(x) for x in leaves(inputs) if is_floating(x)]
    return max([1.0, *sizes]), min(sizes, default=1.0)


def _product(weight: Any, x: Any) -> np.ndarray:
    """weight ⊙ x as one row, 0 where weight is 0, whatever x is there; nothing where there is no weight"""
    if weight is None:
        return np.zeros(0)
    return np.where(np.equal(weight, 0), 0.0, np.multiply(weight, x)).ravel()


def _joined(rows: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *rows])
