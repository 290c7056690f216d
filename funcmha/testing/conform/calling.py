"""One call of an implementation: arrays in its layout and conventions, results as float64 in those of funcmha."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import Array

from .implementation import DIFFERENTIABLE, DeclarationError, Implementation
from .libraries import AUTODIFF, dtype_of, given, taken
from .problems import Numbers, Problem, numbers


class Results(NamedTuple):
    values: dict[str, Array]  # by quantity; a gradient that is due and did not come is None
    dtypes: dict[str, str]
    written: tuple[str, ...] = ()  # inputs that the call wrote to


class CallError(Exception):
    """The implementation did not return what it declares."""


def try_a_call(impl: Implementation, problem: Problem) -> None:
    """DeclarationError where arrays cannot be made as declared, or what comes back is not what is declared"""
    dtype, x = impl.dtypes[0], numbers(problem, impl.dtypes[0])
    try:
        given(x.q, impl.library, dtype, impl.device)
    except Exception as error:  # any library's own, and of what is no library
        told = f"{type(error).__name__}: {error}"
        where = "" if impl.device is None else f" on device={impl.device!r}"
        raise DeclarationError(f"no {dtype} array of library={impl.library!r}{where} can be made: {told}") from None
    try:
        run(impl, problem, x, dtype, gradients=False)
    except CallError as error:
        raise DeclarationError(str(error)) from None
    except (TypeError, AttributeError) as error:
        if impl.library == "numpy" and "numpy.ndarray" in str(error):
            told = f"{type(error).__name__}: {error}"
            raise DeclarationError(f"forward takes no arrays of library='numpy', so declare whose: {told}") from None
    except Exception:  # it raises: that is for the cases to tell
        return


def run(impl: Implementation, problem: Problem, x: Numbers, dtype: str, *, gradients: bool = True) -> Results:
    """The outputs, and the gradients of what has one, of `only` alone where the problem says so"""
    with np.errstate(all="ignore"), warnings.catch_warnings():  # what a kernel warns of is seen in its results
        warnings.simplefilter("ignore")
        return _run(impl, problem, x, dtype, gradients)


def _run(impl: Implementation, problem: Problem, x: Numbers, dtype: str, gradients: bool) -> Results:
    call = _Call(impl, problem, x, dtype)
    wanted = [n for n in DIFFERENTIABLE if n in call.inputs and n in impl.differentiates and problem.only in (None, n)]
    if not gradients or not wanted:
        outputs, grads = call.forward(call.inputs), dict[str, Any]()
    elif impl.backward is not None:
        outputs, grads = call.own_backward(impl.backward)
    else:
        outputs, grads = call.autodiff(wanted)
    values = {name: call.canonical(name, y) for name, y in zip(impl.returned, outputs, strict=True)}
    values |= {
        f"d{n}": None if grads.get(n) is None else call.canonical(f"d{n}", grads[n]) for n in wanted if gradients
    }
    named = {
        **dict(zip(impl.returned, outputs, strict=True)),
        **{f"d{n}": g for n, g in grads.items() if g is not None},
    }
    return Results(values, {name: dtype_of(y) for name, y in named.items()}, call.written())


class OptionsOf:
    """The arrays and options of a problem in the conventions of an implementation, not yet in its library"""

    def __init__(self, impl: Implementation, problem: Problem, x: Numbers) -> None:
        self.impl, self.order = impl, _heads(x.q.shape[1], x.k.shape[1], impl.gqa)
        names = (*DIFFERENTIABLE, "mask", *(f"d{n}" for n in impl.returned))
        self.arrays = {n: self.arranged(n, a) for n in names if (a := getattr(x, n)) is not None}
        if x.mask is not None and impl.mask != "True attends":
            mask = self.arrays["mask"]
            self.arrays["mask"] = ~mask if impl.mask == "True forbids" else np.where(mask, 0.0, -np.inf)
        if "dlse" in self.arrays and impl.lse_base == "2":
            self.arrays["dlse"] *= np.log(2)  # lse = ln 2 · what is returned, whose cotangent then is ln 2 · dlse
        self.static: dict[str, Any] = {"causal": True} if problem.causal and "causal" in impl.options else {}
        if problem.window is not None:
            self.static["window"] = tuple(n + (impl.window == "exclusive") for n in problem.window)
        self.static |= {n: getattr(problem, n) for n in ("scale", "softcap") if getattr(problem, n) is not None}

    @property
    def spelled(self) -> dict[str, str]:
        """The options as they are written in a call."""
        named = {n: n for n in (*DIFFERENTIABLE[3:], "mask") if n in self.arrays}
        return named | {n: repr(value) for n, value in self.static.items()}

    def arranged(self, name: str, a: Array) -> Array:
        """In the order of heads and axes of the implementation."""
        if name in ("q", "do", "dlse") or (name in ("bias", "mask", "dweights") and a.shape[1] > 1):
            a = a[:, self.order]
        elif name == "sink":
            return a[self.order]
        elif name in ("bias_k", "bias_v"):
            return a
        if name in ("q", "k", "v", "do"):
            return _permuted(a, "B H T D", self.impl.layout)
        if name == "dlse":
            return _permuted(a, "B H T", self.impl.lse_layout)
        return a[0] if "B" not in self.impl.layout.split() else a  # of bias, mask and dweights


class _Call:
    def __init__(self, impl: Implementation, problem: Problem, x: Numbers, dtype: str) -> None:
        self.impl, self.dtype, self.given = impl, dtype, OptionsOf(impl, problem, x)
        self.inputs = {name: self.placed(a) for name, a in self.given.arrays.items() if name in DIFFERENTIABLE}
        self.options = {n: self.placed(a) for n, a in self.given.arrays.items() if n == "mask"} | self.given.static
        self.before = {name: taken(a, impl.library) for name, a in self.inputs.items()}

    def placed(self, a: Array, dtype: str | None = None) -> Any:
        return given(a, self.impl.library, dtype or self.dtype, self.impl.device)

    def canonical(self, name: str, y: Any) -> Array:
        return canonical(self.impl, self.given.order, name, taken(y, self.impl.library))

    def cotangents(self, outputs: Sequence[Any]) -> list[Any]:
        """Of every output in its dtype, None where there is none."""
        arrays = self.given.arrays
        pairs = zip(self.impl.returned, outputs, strict=True)
        return [self.placed(arrays[f"d{n}"], dtype_of(y)) if f"d{n}" in arrays else None for n, y in pairs]

    def forward(self, inputs: dict[str, Any]) -> list[Any]:
        return self._forward(inputs)[0]

    def _forward(self, inputs: dict[str, Any]) -> tuple[list[Any], Any]:
        """The outputs, and what the forward saves for a backward of its own"""
        extra = {name: inputs[name] for name in DIFFERENTIABLE[3:] if name in inputs}
        got, saved = self.impl.forward(inputs["q"], inputs["k"], inputs["v"], **extra, **self.options), None
        if self.impl.backward is not None:
            if not isinstance(got, tuple) or len(got) != 2:
                raise CallError("forward must return (outputs, saved), as there is a backward")
            got, saved = got
        names, outputs = self.impl.returned, list(got) if isinstance(got, tuple | list) else [got]
        if len(outputs) != len(names):
            raise CallError(f"forward must return {', '.join(names)} as outputs declares, got {len(outputs)} arrays")
        for name, y in zip(names, outputs, strict=True):
            foreign = isinstance(y, np.ndarray | np.generic) != (self.impl.library == "numpy")
            if foreign or not hasattr(y, "shape"):
                kind = f"{type(y).__module__}.{type(y).__name__}".removeprefix("builtins.")
                raise CallError(f"forward must return {name} as an array of {self.impl.library}, got {kind}")
        return outputs, saved

    def own_backward(self, backward: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
        outputs, saved = self._forward(self.inputs)
        dys = dict(zip(self.impl.returned, self.cotangents(outputs), strict=True))
        do = dys.pop("o")
        if do is None:
            do = self.placed(np.zeros(taken(outputs[self.impl.returned.index("o")], self.impl.library).shape))
        grads = backward(saved, do, **{f"d{n}": dy for n, dy in dys.items() if dy is not None})
        names = [n for n in DIFFERENTIABLE if n in ("q", "k", "v") or n in self.impl.options]
        if not isinstance(grads, tuple | list) or len(grads) != len(names):
            count = len(grads) if isinstance(grads, tuple | list) else type(grads).__name__
            raise CallError(f"backward must return a tuple of {', '.join(f'd{n}' for n in names)}, got {count}")
        return outputs, {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    def autodiff(self, wanted: list[str]) -> tuple[list[Any], dict[str, Any]]:
        def f(*leaves: Any) -> list[Any]:
            return self.forward(self.inputs | dict(zip(wanted, leaves, strict=True)))

        vjp = AUTODIFF[self.impl.library]
        outputs, grads = vjp(f, [self.inputs[n] for n in wanted], self.cotangents)
        return list(outputs), dict(zip(wanted, grads, strict=True))

    def written(self) -> tuple[str, ...]:
        """The inputs that have other numbers than before."""
        after = {name: taken(a, self.impl.library) for name, a in self.inputs.items()}
        return tuple(n for n, a in after.items() if not np.array_equal(a, self.before[n]))


def canonical(impl: Implementation, order: Array, name: str, a: Array) -> Array:
    """A result with the axes, the heads and the units of funcmha"""
    axes = {"o": "B H T D", "dq": "B H T D", "dk": "B H T D", "dv": "B H T D", "lse": "B H T"}.get(name)
    if axes is not None:
        a = _permuted(a, impl.lse_layout if name == "lse" else impl.layout, axes, name)
    elif name in ("weights", "dbias") and "B" not in impl.layout.split():
        a = a[None]
    back = np.argsort(order)
    if name in ("o", "dq", "lse", "weights") or (name == "dbias" and a.ndim > 2 and a.shape[1] > 1):
        a = a[:, back]
    elif name == "dsink":
        a = a[back]
    return a * np.log(2) if name == "lse" and impl.lse_base == "2" else a


def _heads(H: int, K: int, gqa: str | None) -> Array:
    """The query head of funcmha that stands at each place of the implementation."""
    heads = np.arange(H)
    return heads.reshape(K, H // K).T.reshape(H) if gqa == "h % K" and K else heads


def _permuted(a: Array, source: str, target: str, name: str = "") -> Array:
    """The axes of `a`, in the order of `source`, in that of `target`; an axis B of length 1 comes and goes"""
    here, there = source.split(), target.split()
    if a.ndim != len(here):
        raise CallError(f"{name} must have axes {', '.join(here)}, got shape {a.shape}")
    if "B" in there and "B" not in here:
        a, here = a[None], ["B", *here]
    order = [here.index(axis) for axis in there]
    if "B" in here and "B" not in there:
        a = a[0] if here[0] == "B" else np.take(a, 0, axis=here.index("B"))
        order = [i - (i > here.index("B")) for i in order]
    return a.transpose(order)
