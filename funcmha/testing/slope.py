"""The derivative of a function of one variable from its values, with an error estimate.

Odd polynomials are fitted to F(t) − F(−t), over windows of steps of all sizes: c₁ t + c₃ t³ + c₅ t⁵ to seven steps,
each half of the previous one. The residual of the fit (truncation, a corner, the roundings of float64, or those of a
cast to a smaller type) estimates the error of c₁.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

WINDOW = 7  # steps
RATIO = 0.5  # of a step to the previous one
# Of the standard error. A t⁷ or t⁹ that is left over moves c₁ by 3.6 of them, a jump by 4.4 wherever it is; of white
# noise, with four degrees of freedom, one window in 100,000 is further off than 30.
SURE = 30.0
ROUNDING = 2.0**-52  # of float64: no F is known better
STEADY = 1.5  # how much the slope of all terms may differ between the steps of a window


class Slope(NamedTuple):
    value: float  # dF/dt at 0
    error: float  # |value − dF/dt| is at most this
    rounding: float  # the part of the error from float64
    step: float  # the largest of the window
    steady: bool  # whether F changes in proportion to the step: else the window says nothing about 0
    flat: bool  # whether F does not change at all


# ── the first coefficient, from the values at the steps of a window ─────────────────────────────────────────────

_POWERS = (RATIO ** np.arange(WINDOW))[:, None] ** np.array([1, 3, 5])
_INVERSE = np.linalg.pinv(_POWERS)
_LEFT_OVER = (np.eye(WINDOW) - _POWERS @ _INVERSE) / np.sqrt(WINDOW - 3)
_DEVIATION = float(np.linalg.norm(_INVERSE[0]))  # of the coefficient, for noise of deviation 1


def slopes(terms: Callable[[float], np.ndarray], step: float, n: int) -> list[Slope]:
    """dF/dt at 0 of F(t) = Σ terms(t), by each window of n steps from `step` on; less where F is not finite

    The terms are subtracted one by one, before they are summed.
    """
    here, steps = terms(0.0), step * RATIO ** np.arange(n)
    changes = [(terms(float(t)) - terms(float(-t))) / 2 for t in steps]
    odd, moved = (np.array([np.sum(f(change)) for change in changes]) for f in (np.asarray, np.abs))
    windows = [slice(i, i + WINDOW) for i in range(n - WINDOW + 1)]
    found = [_slope(odd[at], moved[at], steps[at], here) for at in windows]
    return [slope for slope in found if np.isfinite(slope.error)]


def _slope(odd: np.ndarray, moved: np.ndarray, steps: np.ndarray, here: np.ndarray) -> Slope:
    """By one window: of the sum of all terms, and of what each has moved by"""
    noise, least = ROUNDING * float(np.linalg.norm(here)), 4 * ROUNDING * float(np.sum(np.abs(here)))
    of, step = _DEVIATION / float(steps[0]), float(steps[0])
    off = SURE * float(np.linalg.norm(_LEFT_OVER @ odd)) + noise
    steady = np.max((moved - least) / steps) <= STEADY * np.min((moved + least) / steps)
    return Slope(float(_INVERSE[0] @ odd) / step, off * of, noise * of, step, bool(steady), not moved.any())


def likely(found: list[Slope]) -> list[Slope]:
    """The most certain slope, and those that differ from it and are certain to a quarter of themselves"""
    steady = sorted((slope for slope in found if slope.steady), key=lambda slope: slope.error)
    others = [s for s in steady[1:] if abs(s.value - steady[0].value) > s.error + steady[0].error]
    return [*steady[:1], *(s for s in others if s.error <= abs(s.value) / 4)]
