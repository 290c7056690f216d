"""docs/pipeline.svg: the score pipeline and its reverse, with the arrays of one head that funcmha computes

python docs/pipeline.py
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np

from funcmha import attention, attention_vjp, attention_weights, dropout, masks, ops

T, S, D = 5, 7, 4  # queries, keys, width
CELL, GAP, TOP = 10, 40, 66  # of an array's entries, between two arrays, above the first
ROWS = ("u", "c", "z", "p", "a", "o")
LEFT, RIGHT = 96, 592  # the left edge of arrays of the forward, and the right edge of those of the reverse
WIDTH, HEIGHT = 812, TOP + len(ROWS) * (T * CELL + GAP) + 60

FORWARD = {
    "u": ["u = scale · q kᵀ"],
    "c": ["c = softcap · tanh(u / softcap)"],
    "z": ["z = c + bias", "z = −∞ where not mask"],
    "p": ["p = softmax(z, sink)"],
    "a": ["a = p ⊙ keep / (1 − rate)"],
    "o": ["o = a v"],
}
INPUTS = {"u": "q, k", "z": "bias, mask", "p": "sink", "a": "keep", "o": "v"}
CACHED = {"u": "q, k", "c": "1 − (c / softcap)²", "p": "p, lse", "a": "keep", "o": "v"}
REVERSE = {  # from the row below to the row above, and the formula beside the arrow
    ("dp", "do"): ["dp = (do vᵀ) ⊙ keep / (1 − rate)", "+ dweights"],
    ("dz", "dp"): ["δ = Σ p dp,  dz = p (dp − δ + dlse)"],
    ("du", "dz"): ["du = dz (1 − (c / softcap)²)"],
}
GRADIENTS = {
    "du": ["dq = scale · du k", "dk = scale · duᵀ q"],
    "dz": ["dbias = unbroadcast(dz)"],
    "dp": ["dsink = Σ exp(sink − lse)", "            (dlse − δ)"],
    "do": ["dv = aᵀ do"],
}
STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328 }
.head { font-weight: bold; font-size: 13px } .small { font-size: 11px; fill: #57606a } .end { text-anchor: end }
.middle { text-anchor: middle } .card { fill: #ffffff; stroke: #d0d7de }
.line { stroke: #57606a; stroke-width: 1.5; fill: none } .kept { stroke: #8c959f; stroke-dasharray: 2 4 }
.chip { fill: #f0f3f6; stroke: #d0d7de } .frame { fill: none; stroke: #57606a } .tip { fill: #57606a }
.mark { stroke: #57606a; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9198a1 } .card { fill: #0d1117; stroke: #3d444d } .line { stroke: #9198a1 }
.kept { stroke: #656c76 } .chip { fill: #212830; stroke: #3d444d } .frame { stroke: #9198a1 } .tip { fill: #9198a1 }
}
"""


def arrays() -> dict[str, np.ndarray]:
    """Every array of the figure: those of one call of `attention` and its vjp, and what stands between them"""
    rng = np.random.default_rng(3)
    q, k, v, do = (rng.standard_normal(shape) for shape in ((T, D), (S, D), (S, D), (T, D)))
    bias, dweights, dlse = rng.standard_normal((T, S)), 0.3 * rng.standard_normal((T, S)), 0.3 * rng.standard_normal(T)
    keep, rate, softcap = rng.random((T, S)) >= 0.2, 0.2, 1.5
    mask, sink = masks.causal(offset=S - T), np.zeros(())
    kept = dropout.masked(keep, rate)
    o, cache = attention(q, k, v, bias, sink, mask=mask, softcap=softcap, dropout=kept, engine="sequential")
    *_, dz, _ = attention_vjp(cache, do, dweights=dweights, dlse=dlse)  # the gradient of a bias (T, S) is dz
    p = attention_weights(cache)
    return {
        "u": ops.scores(q, k)[0],
        "c": ops.scores(q, k, softcap=softcap)[0],
        "z": ops.scores(q, k, bias, softcap=softcap, mask=mask)[0],
        "p": p,
        "a": np.where(keep, ops.drop(p, keep, rate), np.nan),
        "o": o,
        "du": dz * cache.slope,
        "dz": dz,
        "dp": ops.drop(do @ v.T, keep, rate) + dweights,
        "do": do,
    }


def picture() -> str:
    """The text of the file"""
    found = arrays()
    parts = [f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>']
    parts += [text(LEFT, 28, "attention", "head"), text(RIGHT, 28, "attention_vjp", "head end")]
    parts += [text(middle(), 28, "the cache", "head middle")]
    for name in ROWS:
        parts += array(LEFT, y_of(name), name, found[name])
        parts += forward(name)
    for name in ("du", "dz", "dp", "do"):
        parts += array(RIGHT - CELL * found[name].shape[1], y_of(name), name, found[name])
        parts += gradients(name)
    for (above, below), formula in REVERSE.items():
        parts += reverse(above, below, formula)
    for name, label in CACHED.items():
        parts += cached(name, label)
    parts += [*cotangents(), *legend()]
    body = "\n".join(parts)
    title = "The score pipeline of attention, downwards, and its reverse, upwards"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' role="img" aria-label="{title}">\n<title>{title}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def y_of(name: str) -> int:
    """The top of a row, of an array or of its gradient"""
    return TOP + GAP + ROWS.index(name.removeprefix("d")) * (T * CELL + GAP) - GAP // 2


def middle() -> int:
    """Between the columns"""
    return (LEFT + RIGHT) // 2


def forward(name: str) -> Iterator[str]:
    """The arrow into an array, its formula, and what comes in from the left"""
    x, y = LEFT + 8, y_of(name)
    yield arrow(x, y - GAP + 3, y - 3)
    yield from lines(x + 12, y - GAP / 2 + 4, FORWARD[name], "")
    if name in INPUTS:
        yield f'<path class="line" d="M{x - 16} {y - GAP / 2} h16"/>'
        yield text(x - 22, y - GAP / 2 + 4, INPUTS[name], "end")


def reverse(above: str, below: str, formula: list[str]) -> Iterator[str]:
    """The arrow from a gradient up to the one before, and its formula"""
    x, start = RIGHT - 8, y_of(below)
    yield arrow(x, start - 3, y_of(above) + T * CELL + 3)
    yield from lines(x - 12, start - GAP / 2 + 4, formula, "end")


def gradients(name: str) -> Iterator[str]:
    """What leaves to the right"""
    y = y_of(name) + T * CELL / 2
    yield f'<path class="line" d="M{RIGHT + 3} {y} h12"/>' + tip(RIGHT + 20, y, 1, 0)
    yield from lines(RIGHT + 26, y + 4, GRADIENTS[name], "")


def cotangents() -> Iterator[str]:
    """What comes in from below"""
    y = y_of("do") + T * CELL
    yield arrow(RIGHT - 8, y + GAP // 2 + 3, y + 3) + text(RIGHT - 20, y + GAP // 2 + 2, "do, dweights, dlse", "end")


def cached(name: str, label: str) -> Iterator[str]:
    """What the reverse reads of the forward, on a dotted line from one column to the other"""
    y, half = y_of(name) + T * CELL / 2, 4 * len(label) + 8
    stop = RIGHT - S * CELL - 6 if name in ("u", "p", "o") else RIGHT - 12
    yield f'<path class="kept" d="M{LEFT + S * CELL + 6} {y} H{stop}"/>'
    yield f'<rect class="chip" x="{middle() - half}" y="{y - 10}" width="{2 * half}" height="20" rx="10"/>'
    yield text(middle(), y + 4, label, "middle")


def legend() -> Iterator[str]:
    """What the colours say"""
    y = HEIGHT - 22
    for i, value in enumerate(np.linspace(-1, 1, 9)):
        yield f'<rect x="{LEFT + 14 * i}" y="{y}" width="14" height="10" fill="{colour(value)}"/>'
    yield text(LEFT - 8, y + 9, "−", "small end") + text(
        LEFT + 9 * 14 + 8, y + 9, "+  of each array's largest", "small"
    )
    yield mark(LEFT + 354, y, np.nan) + text(LEFT + 370, y + 9, "−∞ or dropped", "small")


# ── the marks ────────────────────────────────────────────────────────────────────────────────────────────────────


def array(x: int, y: int, name: str, a: np.ndarray) -> Iterator[str]:
    """The entries as squares, and the name"""
    largest = np.abs(a[np.isfinite(a)]).max()
    for (i, j), value in np.ndenumerate(a / largest):
        yield mark(x + CELL * j, y + CELL * i, value)
    yield f'<rect class="frame" x="{x}" y="{y}" width="{CELL * a.shape[1]}" height="{CELL * a.shape[0]}"/>'
    yield text(x + CELL * a.shape[1] + 8, y + 12, name, "head") if x == LEFT else text(x - 8, y + 12, name, "head end")


def mark(x: float, y: float, value: float) -> str:
    """One entry, crossed out where it is −∞ or dropped"""
    if np.isfinite(value):
        return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{colour(value)}"/>'
    cross = f'<path class="mark" d="M{x + 3} {y + 3} l4 4 m0 -4 l-4 4"/>'
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#d0d7de"/>{cross}'


def colour(value: float) -> str:
    """Blue at −1, white at 0, orange at 1: told apart with every kind of colour blindness"""
    end = np.array([33, 102, 172] if value < 0 else [179, 88, 6])
    return "#{:02x}{:02x}{:02x}".format(*np.rint(247 + abs(value) * (end - 247)).astype(int))


def arrow(x: float, start: float, stop: float) -> str:
    """Down or up"""
    way = 1 if stop > start else -1
    return f'<path class="line" d="M{x} {start} V{stop - 5 * way}"/>' + tip(x, stop, 0, way)


def tip(x: float, y: float, dx: int, dy: int) -> str:
    """The head of an arrow that ends here"""
    return f'<path class="tip" d="M{x} {y} l{-7 * dx + 4 * dy} {-7 * dy + 4 * dx} l{-8 * dy} {-8 * dx} z"/>'


def lines(x: float, y: float, formula: list[str], kind: str) -> Iterator[str]:
    """One below the other, around y"""
    for i, line in enumerate(formula):
        yield text(x, y + 15 * (i - (len(formula) - 1) / 2), line, kind)


def text(x: float, y: float, line: str, kind: str) -> str:
    """A line of text"""
    return f'<text class="{kind}" x="{x}" y="{y}" xml:space="preserve">{escape(line)}</text>'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
