"""Functions that pickle finds by their names."""

import pickle
import sys
from typing import Any


def check_named(what: str, **functions: Any) -> None:
    """Raise PicklingError for a function that no module has by its name: a lambda, or one made inside another.

    What has no name, as a `functools.partial`, is for pickle to judge.
    """
    for argument, f in functions.items():
        path, found = getattr(f, "__qualname__", None), sys.modules.get(getattr(f, "__module__", None) or "")
        if path is None:
            continue
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is not f:
            raise pickle.PicklingError(
                f"{what}({path}, …) cannot be pickled: {argument} must be a function that its module has under its "
                f"name, as one defined there with def; {f.__module__} has no {path}"
            )
