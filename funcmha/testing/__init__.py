"""For tests of attention, funcmha's or yours: problems to try, bounds to hold, gradients to check.

`funcmha.testing.strategies` needs hypothesis and is imported by name; the rest needs NumPy alone.
"""

from .gradcheck import check_vjp
from .gradient import Agreement

__all__ = ["Agreement", "check_vjp"]
