"""The names of the members of a file, and the dotted paths of the leaves that they are."""

import re
import warnings
from collections.abc import Iterable

from funcmha import tree

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.npy")


def keys(names: Iterable[str]) -> list[str]:
    """The members' names less .npy; ValueError for one that is not allowed, comes twice, or runs through another."""
    found: dict[str, None] = {}
    folded: dict[str, str] = {}
    for name in names:
        if len(name) > 255 or not NAME.fullmatch(name) or any(re.fullmatch("__.*__", part) for part in name.split(".")):
            raise ValueError(
                f"{name[:300]!r} must be named in letters, digits and _, with dots between, nothing __like_this__, "
                "at the end .npy, in at most 255 bytes"
            )
        key = name.removesuffix(".npy")
        if key in found:
            raise ValueError(f"{key} must be there once, got it twice")
        if folded.setdefault(key.lower(), key) != key:
            warnings.warn(f"{folded[key.lower()]} and {key} differ in case only", stacklevel=4)
        found[key] = None
    tree.unflatten(found)
    return list(found)
