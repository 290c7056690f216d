"""For tests of attention, funcmha's or yours: problems to draw, error bounds, gradient checks.

`funcmha.testing.strategies` needs hypothesis and is imported by name; the rest needs only NumPy.
"""

from .gradcheck import check_vjp
from .gradient import Agreement

__all__ = ["Agreement", "check_vjp"]
