"""All ranks go on, or all raise the same error: what they were given is compared before the first array is sent."""

import builtins
import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from funcmha._arrays import is_array

from .comm import Comm

Facts = dict[str, Any]  # name: what must be the same on all ranks, as text


def agree(comm: Comm, local: Callable[[], tuple[Facts, Sequence[int]]]) -> np.ndarray:
    """The numbers of all ranks (n, …), where the facts are the same on all, by one gather of a few words

    `local` checks the arguments of this rank. Where it raises on any, every rank raises that, with the rank; where
    facts differ, a ValueError that says which, on which ranks, and what they are.
    """
    facts: Facts = {}
    numbers: Sequence[int] = ()
    error: Exception | None = None
    try:
        facts, numbers = local()
    except Exception as raised:
        error = raised
    if comm.size == 1:
        if error is not None:
            raise error
        return np.array([numbers], np.int64)
    text = json.dumps([type(error).__name__, str(_told(error))] if error is not None else facts).encode()
    digest = int.from_bytes(blake2b(text, digest_size=7).digest(), "little")
    words = np.zeros(16, np.int64)
    words[:3] = error is not None, len(text), digest
    words[3 : 3 + len(numbers)] = numbers
    table = _gathered(comm, words)
    if table[:, 0].any() or (table[:, 2] != table[0, 2]).any():
        _disagree(comm, text, table)
    return table[:, 3 : 3 + len(numbers)]


def _told(error: Exception) -> Any:
    """What an error says; the text of a KeyError is its argument in quotes."""
    return error.args[0] if isinstance(error, KeyError) and error.args else error


def _gathered(comm: Comm, words: np.ndarray) -> np.ndarray:
    table = np.empty((comm.size, *words.shape), words.dtype)
    comm.all_gather(words, list(table))
    return table


def _disagree(comm: Comm, text: bytes, table: np.ndarray) -> None:
    """Raise, on every rank the same."""
    padded = np.zeros(int(table[:, 1].max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = [json.loads(row[:n].tobytes()) for row, n in zip(_gathered(comm, padded), table[:, 1], strict=True)]
    for rank in np.flatnonzero(table[:, 0]).tolist():
        kind, message = texts[rank]
        error = getattr(builtins, kind, RuntimeError)
        raise error(f"rank {rank}: {message}") from None
    for name in dict.fromkeys(name for facts in texts for name in facts):
        values: dict[str, list[int]] = {}
        for rank, facts in enumerate(texts):
            values.setdefault(str(facts.get(name)), []).append(rank)
        if len(values) > 1:
            got = " and ".join(f"{value} on {_ranks(some)}" for value, some in values.items())
            raise ValueError(f"{name} must be the same on all ranks, got {got}")


def _ranks(some: list[int]) -> str:
    return f"rank{'s' if len(some) > 1 else ''} {', '.join(map(str, some))}"


def described(x: Any) -> str:
    """A value as text that is the same for the same value: arrays of NumPy by their numbers, others by their shape"""
    if is_array(x):
        shape = f"{tuple(x.shape)} of {x.dtype}"
        if not isinstance(x, np.ndarray):
            return shape
        return f"{shape} with checksum {blake2b(np.ascontiguousarray(x).tobytes(), digest_size=4).hexdigest()}"
    if isinstance(x, tuple):
        fields = getattr(x, "_fields", [""] * len(x))
        parts = (
            f"{name}={described(value)}" if name else described(value) for name, value in zip(fields, x, strict=True)
        )
        return f"{type(x).__name__}({', '.join(parts)})"
    if isinstance(x, list):
        return described(tuple(x))
    return repr(x)
