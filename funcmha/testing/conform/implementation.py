"""What the author of an attention declares: how it is called, which conventions it follows, what it refuses.

Axes: B batch, H query heads, K key/value heads, T queries, S keys, D query/key width, E value width.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from funcmha.testing.profiles import PROFILES, Profile, profile_of

OPTIONS = ("bias", "mask", "sink", "bias_k", "bias_v", "causal", "window", "scale", "softcap")  # of a forward, by name
ELSEWHERE = {
    "is_causal": "causal",
    "attn_mask": "mask",
    "attn_bias": "bias",
    "sm_scale": "scale",
    "softmax_scale": "scale",
    "window_size": "window",
    "local_window_size": "window",
    "sinks": "sink",
    "logits_soft_cap": "softcap",
}  # fmt: skip — what other libraries call them
DIFFERENTIABLE = ("q", "k", "v", "bias", "sink", "bias_k", "bias_v")
OUTPUTS = ("o", "lse", "weights")
DTYPES = ("float64", "float32", "float16", "bfloat16")
LETTERS = ("B", "H", "K", "T", "S", "D", "E")
CHOICES = {
    "layout": ("B H T D", "B T H D", "T B H D", "H T D", "T H D"),
    "lse_layout": ("B H T", "B T H", "T B H", "H T", "T H"),
    "lse_base": ("e", "2"),
    "mask": ("True attends", "True forbids", "additive"),
    "causal": ("top-left", "bottom-right"),
    "window": ("inclusive", "exclusive"),
    "empty_row": ("zero", "mean", "nan", "undefined"),
    "scale_default": ("rsqrt(D)", "one"),
    "cap_order": ("scale cap bias mask", "scale bias cap mask"),
    "gqa": ("h // g", "h % K"),
}  # the conventions of a declaration, and what each may be


class DeclarationError(ValueError):
    """A declaration that cannot be, or that is not what the implementation does."""


@dataclass(frozen=True)
class Implementation:
    """An attention to be judged, and what its author declares of it.

    forward    f(q, k, v, *, …) takes arrays of `library` and any of OPTIONS by name, and is called with those alone
               that a case sets. It returns `outputs`; with a backward of its own, (outputs, saved). bias_k (K, D) and
               bias_v (K, E) are a key and a value more, which every query attends
    backward   f(saved, do, *, dlse=…, dweights=…) → dq, dk, dv, then dbias, dsink, dbias_k and dbias_v of those that
               the forward takes. None: the autodiff of PyTorch, JAX, MLX, tinygrad and Paddle; of another library the
               forward alone is judged
    outputs    "o", or ("o", "lse", …): what the forward returns, in this order, out of o, lse and weights
    library    "numpy", "torch", "jax", or the name of any module with `asarray`, which arrays are given in
    gradients  what has a gradient, out of q, k, v, bias, sink, bias_k and bias_v; None: all that the forward takes
    limits     sizes that it takes, by axis letter: a number, (least, most), (least, most, multiple of), or another
               letter that it equals; "G" is H / K. What is outside is listed as refused, not failed. {"causal": True}:
               it is causal always, with or without an option of that name
    expected   {"feature/quantity": why}: known failures; one that no longer fails is a failure of its own

    The rest are conventions, each one of `CHOICES`: they are measured before anything is judged. The causal alignment
    is that of windows too. Raises DeclarationError for what cannot be meant.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    outputs: str | tuple[str, ...] = "o"
    library: str = "numpy"
    device: str | None = None
    dtypes: tuple[str, ...] = ("float32",)
    gradients: tuple[str, ...] | None = None
    layout: str = "B H T D"
    lse_layout: str = "B H T"
    lse_base: str = "e"
    lse_includes_sink: bool = True
    mask: str = "True attends"
    causal: str = "top-left"
    window: str = "inclusive"
    empty_row: str = "zero"
    scale_default: str = "rsqrt(D)"
    cap_order: str = "scale cap bias mask"
    gqa: str | None = "h // g"  # which key/value head query head h reads, with g = H / K; None: K = H alone
    arithmetic: str | Profile = "flash"
    deterministic: bool = True
    limits: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # shown in the report

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise DeclarationError(f"name must be a string, got {type(self.name).__name__}")
        for what, names, allowed in (("outputs", self.returned, OUTPUTS), ("dtypes", self.dtypes, DTYPES)):
            if isinstance(names, str) or not names or [name for name in names if name not in allowed]:
                raise DeclarationError(f"{what} must be a tuple out of {_list(allowed)}, got {getattr(self, what)!r}")
        if "o" not in self.returned:
            raise DeclarationError(f"outputs must have 'o', got {self.outputs!r}")
        for what, choices in CHOICES.items():
            given = getattr(self, what)
            if given not in choices and not (what == "gqa" and given is None):
                raise DeclarationError(f"{what} must be one of {_list(choices)}, got {given!r}")
        _check_function("forward", self.forward)
        if self.backward is not None:
            _check_function("backward", self.backward)
        self._check_options()
        self._check_limits()
        try:
            profile_of(self.arithmetic)
        except (TypeError, ValueError) as error:
            raise DeclarationError(str(error)) from None

    def _check_options(self) -> None:
        takes = inspect.signature(self.forward).parameters.values()
        by_place = [p for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [p.name for p in by_place if p.default is p.empty]
        if len(needed) > 3 or (len(by_place) < 3 and not any(p.kind is p.VAR_POSITIONAL for p in takes)):
            raise DeclarationError(
                f"forward must take q, k and v by position, and the rest by name: it takes {_list(needed)}"
            )
        unknown = [p.name for p in takes if p.kind is p.KEYWORD_ONLY and p.name not in OPTIONS and p.default is p.empty]
        renamed = [p.name for p in takes if p.name in ELSEWHERE]
        if renamed:
            raise DeclarationError(f"forward takes {renamed[0]!r}, which is {ELSEWHERE[renamed[0]]!r} here: rename it")
        if unknown:
            raise DeclarationError(f"forward must take options out of {_list(OPTIONS)}, and requires {_list(unknown)}")
        if self.gradients is not None and not {*self.gradients} <= {"q", "k", "v", *self.options} & {*DIFFERENTIABLE}:
            raise DeclarationError(
                f"gradients must be out of {_list(DIFFERENTIABLE)} and taken by forward, got {self.gradients!r}"
            )

    def _check_limits(self) -> None:
        for letter, limit in self.limits.items():
            if letter not in (*LETTERS, "G", "causal"):
                raise DeclarationError(f"limits must be of {_list((*LETTERS, 'G', 'causal'))}, got {letter!r}")
            if letter == "causal":
                if limit is not True:
                    raise DeclarationError(f"limits['causal'] must be True, of what is causal always, got {limit!r}")
                continue
            numbers = limit if isinstance(limit, tuple) else (limit,)
            known = limit in LETTERS if isinstance(limit, str) else all(type(n) is int and n >= 0 for n in numbers)
            short = isinstance(limit, tuple) and len(limit) not in (2, 3)
            if not known or short or (len(numbers) == 3 and numbers[2] == 0):
                meant = "a number, (least, most), (least, most, multiple of), or an axis letter"
                raise DeclarationError(f"limits[{letter!r}] must be {meant}, got {limit!r}")

    @property
    def returned(self) -> tuple[str, ...]:
        """The outputs, in their order."""
        return (self.outputs,) if isinstance(self.outputs, str) else self.outputs

    @cached_property
    def options(self) -> tuple[str, ...]:
        """The options that the forward takes."""
        parameters = inspect.signature(self.forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return OPTIONS
        return tuple(name for name in OPTIONS if name in parameters)

    @property
    def differentiates(self) -> tuple[str, ...]:
        """What has a gradient."""
        if self.gradients is not None:
            return self.gradients
        from .libraries import AUTODIFF

        taken = tuple(name for name in DIFFERENTIABLE if name in ("q", "k", "v", *self.options))
        return taken if self.backward is not None or self.library in AUTODIFF else ()

    @property
    def profile(self) -> Profile:
        """The arithmetic, as a profile."""
        return PROFILES[self.arithmetic] if isinstance(self.arithmetic, str) else self.arithmetic

    @property
    def always_causal(self) -> bool:
        """Whether it has no other mode."""
        return "causal" in self.limits

    def refuses(self, **sizes: int) -> str | None:
        """Why these sizes are outside of the limits, or None"""
        for letter, limit in self.limits.items():
            n = sizes[letter]
            if letter == "causal":
                if not n:
                    return "not causal, declared causal always"
                continue
            if isinstance(limit, str):
                if n != sizes[limit]:
                    return f"{letter}={n}, declared {limit}"
                continue
            low, high, multiple = span(limit)
            if not low <= n <= high or n % multiple:
                return f"{letter}={n}, declared {_told(low, high, multiple)}"
        if self.gqa is None and sizes["G"] != 1:
            return f"G={sizes['G']}, declared gqa=None"
        return None

    def declared(self) -> dict[str, Any]:
        """The conventions by name."""
        return {name: getattr(self, name) for name in (*CHOICES, "lse_includes_sink")}


def span(limit: int | tuple[int, ...]) -> tuple[int, int, int]:
    """Least, most, and what it is a multiple of"""
    low, high, multiple = (limit, limit, 1) if isinstance(limit, int) else (*limit, 1)[:3]
    return low, high, multiple


def _told(low: int, high: int, multiple: int) -> str:
    if low == high:
        return str(low)
    return f"{low} … {high}" + (f", multiples of {multiple}" if multiple > 1 else "")


def _check_function(name: str, f: Any) -> None:
    if not callable(f):
        raise DeclarationError(f"{name} must be a function, got {type(f).__name__}")


def _list(names: Any) -> str:
    return ", ".join(map(repr, names))
