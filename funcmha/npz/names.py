"""The names of the members of a file, and the dotted paths of the leaves that they are."""

import re
import warnings
from collections.abc import Iterable

from funcmha import tree

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.npy")


def keys(names: Iterable[str]) -> dict[str, int]:
    """Of each member its name less .npy, and which one it is, in the order of their tree.

    Branches come as they first do; but where all keys of a branch are numbers they go up, as layers do: 2 before 10,
    which sorted names have the other way round. ValueError for a name that is not allowed, comes twice, or runs through
    another.
    """
    found: dict[str, int] = {}
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
            warnings.warn("{} and {} differ in case only".format(*sorted((folded[key.lower()], key))), stacklevel=4)
        found[key] = len(found)
    return tree.flatten(_numbered(tree.unflatten(found)))


def _numbered(node: tree.Tree) -> tree.Tree:
    if not isinstance(node, dict):
        return node
    numbers = all(re.fullmatch("[0-9]+", key) for key in node)
    return {key: _numbered(node[key]) for key in (sorted(node, key=int) if numbers else node)}
