"""A failing case as a few lines that need NumPy and the implementation alone."""

import numpy as np

from .calling import OptionsOf
from .implementation import DIFFERENTIABLE, Implementation
from .ready import READY
from .shrink import Small

ENTRIES = 400  # so many numbers at most are written out; more come from the seed of the problem


def reproduction(impl: Implementation, small: Small, target: str) -> str:
    """A script: the arrays, the call, its gradients, and what must come"""
    case, x, row = small
    options = OptionsOf(impl, case.problem, x)
    if sum(a.size for a in options.arrays.values()) > ENTRIES:
        return f"# too large to write out: {row.case.replay}"
    place, _, name = target.rpartition(":")
    lines = ["import numpy as np", *_imports(impl, place, name), ""]
    lines += [f"{n} = {_literal(impl, a, case.dtype)}" for n, a in options.arrays.items()]
    given = ", ".join(["q", "k", "v", *(f"{n}={value}" for n, value in options.spelled.items())])
    wanted = [n for n in impl.differentiates if n in options.arrays]
    lines += _CALLS.get(impl.library, _by_forward)(impl, given, wanted, options, row.quantity)
    return "\n".join([*lines, f"# {row.why}"])


def _imports(impl: Implementation, place: str, name: str) -> list[str]:
    known = {"torch": ["import torch"], "jax": ["import jax"], "numpy": []}
    library = known.get(impl.library, ["from funcmha.testing.conform.libraries import given"])
    if place.endswith(".py"):
        return [*library, f"from {place.rpartition('/')[2].removesuffix('.py')} import {name} as impl"]
    if f"{place}:{name}" in READY:
        return [*library, "from funcmha.testing.conform.ready import ready", f"impl = ready({f'{place}:{name}'!r})"]
    return [*library, f"from {place} import {name} as impl"]


def _literal(impl: Implementation, a: np.ndarray, dtype: str) -> str:
    short = a if a.dtype == bool else a.astype({"float64": np.float64, "float16": np.float16}.get(dtype, np.float32))
    text = np.array2string(short, separator=", ", threshold=10**6, floatmode="unique", max_line_width=10**6)
    numbers = " ".join(text.split()).replace("inf", "np.inf")
    if a.dtype == bool:
        made = f"np.array({numbers}).reshape{a.shape}"
        as_array = {"torch": f"torch.tensor({made})", "jax": f"jax.numpy.asarray({made})", "numpy": made}
        return as_array.get(impl.library, f"given({made}, {impl.library!r}, 'bool')")
    made = f"np.array({numbers}, float).reshape{a.shape}"
    if impl.library == "torch":
        return f"torch.tensor({made}).to(torch.{dtype})"
    if impl.library == "jax":
        return f"jax.numpy.asarray({made}, {dtype!r})"
    return f"{made}.astype({dtype!r})" if impl.library == "numpy" else f"given({made}, {impl.library!r}, {dtype!r})"


def _cotangents(impl: Implementation, options: OptionsOf) -> list[str]:
    return [f"d{n}" if f"d{n}" in options.arrays else "None" for n in impl.returned]


def _of_torch(impl: Implementation, given: str, wanted: list[str], options: OptionsOf, quantity: str) -> list[str]:
    if quantity[0] != "d":
        return [f"y = impl.forward({given})", "print(y)"]
    names, pairs = ", ".join(wanted), list(zip(impl.returned, _cotangents(impl, options), strict=True))
    outputs = [f"y[{i}]" if len(pairs) > 1 else "y" for i, (_, dy) in enumerate(pairs) if dy != "None"]
    dys = [dy for _, dy in pairs if dy != "None"]
    grads = f"torch.autograd.grad([{', '.join(outputs)}], [{names}], [{', '.join(dys)}], allow_unused=True)"
    return [
        f"for x in ({names},): x.requires_grad_()",
        f"y = impl.forward({given})",
        f"print(dict(zip({[f'd{n}' for n in wanted]!r}, {grads}))[{quantity!r}])",
    ]


def _of_jax(impl: Implementation, given: str, wanted: list[str], options: OptionsOf, quantity: str) -> list[str]:
    if quantity[0] != "d":
        return [f"print(impl.forward({given}))"]
    names = ", ".join(wanted)
    zeros = [dy if dy != "None" else f"0 * y[{i}]" for i, dy in enumerate(_cotangents(impl, options))]
    dys = f"({', '.join(zeros)})" if len(zeros) > 1 else zeros[0]
    pull = f"y, pull = jax.vjp(lambda {names}: impl.forward({given}), {names})"
    return [pull, f"print(dict(zip({[f'd{n}' for n in wanted]!r}, pull({dys})))[{quantity!r}])"]


def _by_forward(impl: Implementation, given: str, wanted: list[str], options: OptionsOf, quantity: str) -> list[str]:
    if impl.backward is None:
        return [f"print(impl.forward({given}))"]
    dys = {n: dy for n, dy in zip(impl.returned, _cotangents(impl, options), strict=True) if dy != "None"}
    do = dys.pop("o", None)
    more = "".join(f", d{n}={dy}" for n, dy in dys.items())
    names = [f"d{n}" for n in DIFFERENTIABLE if n in ("q", "k", "v", *impl.options)]
    lines = [f"y, saved = impl.forward({given})"]
    if quantity[0] != "d":
        return [*lines, f"print(y[{impl.returned.index(quantity)}])" if len(impl.returned) > 1 else "print(y)"]
    lines += [] if do else [f"do = 0 * y[{impl.returned.index('o')}]"]
    return [*lines, f"print(dict(zip({names!r}, impl.backward(saved, do{more})))[{quantity!r}])"]


_CALLS = {"torch": _of_torch, "jax": _of_jax}
