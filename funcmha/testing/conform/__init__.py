"""The referee: whether an implementation of attention is right, forward and every gradient, feature by feature.

    impl = Implementation("mine", forward, library="torch", dtypes=("float32", "bfloat16"))
    assert_conforms(impl)

From the command line: `python -m funcmha conform FILE.py:impl`. Bounds are derived from what the implementation
declares to round, none is tuned; conventions are measured before anything is judged; structural laws need no tolerance.
"""

from .checking import Feature, Report, assert_conforms, check
from .implementation import DeclarationError, Implementation

__all__ = ["DeclarationError", "Feature", "Implementation", "Report", "assert_conforms", "check"]
