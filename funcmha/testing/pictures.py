"""Pictures of masks, weights, parameters and errors, by matplotlib: the extra `plot`

    pictures.mask(masks.causal() & masks.lengths(lengths), 64, 64).savefig("mask.png")
    pictures.weights(cache).savefig("weights.svg")
    pictures.parameters(params).savefig("params.png")

Each function returns a `matplotlib.figure.Figure`, which knows no window and no global state. Blue and orange, and
light and dark, are told apart with every kind of colour blindness (Okabe and Ito 2008; viridis, Blues of matplotlib).

Axes: T queries, S keys, H query heads, K key/value heads.
"""

import html
import io
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from math import ceil, prod
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from funcmha._arrays import Array
from funcmha.engines import attention_weights
from funcmha.masks import Mask, as_mask
from funcmha.params import SPEC, Params, sizes

from .rounding import host

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .verify import Row

__all__ = ["errors", "errors_html", "mask", "parameters", "svg", "weights"]

P = ParamSpec("P")
R = TypeVar("R")
BLUE, ORANGE, GREY, DARK = "#0072b2", "#d55e00", "#c9ced4", "#24292f"
BLOCKS = {"empty": "#ffffff", "mixed": "#f0c27b", "full": "#7fb3d5"}
HEADS = 64  # panels of a figure at most: more are not read


def _by_matplotlib(draw: Callable[P, R]) -> Callable[P, R]:
    """`draw`, or an error that names the extra"""

    @wraps(draw)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib as _  # noqa: F401
        except ImportError as error:
            message = "pictures are drawn by matplotlib, which is not installed: pip install 'funcmha[plot]'"
            raise ModuleNotFoundError(message, name="matplotlib") from error
        return draw(*args, **kwargs)

    return checked


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


@_by_matplotlib
def mask(mask: Mask | Array, T: int, S: int, *, block: tuple[int, int] | None = None) -> "Figure":
    """What each query may attend to, and in colour what `Mask.block` answers of blocks of so many queries and keys

    One panel for each sample and head that the mask tells apart. Empty blocks are white, full ones blue, mixed ones
    orange: an engine skips the first, and looks at single keys in the last alone. block: (16, 16) at most unless given,
    so that there are some to see.
    """
    given = mask if isinstance(mask, Mask) else as_mask(mask)
    rows, cols = block or (max(1, min(16, ceil(T / 4))), max(1, min(16, ceil(S / 4))))
    if T < 1 or S < 1 or rows < 1 or cols < 1:
        raise ValueError(f"T, S and block must be at least 1, got {T}, {S} and {(rows, cols)}")
    panels = list(_panels(given, T, S))
    figure, axes = _grid(len(panels), 3.2, "queries i", "keys j")
    for (name, one), ax in zip(panels, axes, strict=True):
        _draw_mask(ax, one, T, S, rows, cols)
        ax.set_title(name, fontsize=9)
    blocks = f"blocks of {rows} × {cols}"
    labels = {f"{blocks}: full": BLOCKS["full"], "mixed": BLOCKS["mixed"], "empty": BLOCKS["empty"], "attends": DARK}
    _legend(figure, labels)
    return figure


def _panels(given: Mask, T: int, S: int) -> Iterator[tuple[str, Mask]]:
    """The masks (T, S) of each sample and head, with their names; HEADS of them at most"""
    shape = given.shape(T, S)
    batch, H = shape[:-3], shape[-3] if len(shape) > 2 else 1
    for number, index in enumerate(np.ndindex(*batch, H)):
        if number < HEADS:
            *sample, h = index
            names = [f"sample {', '.join(map(str, sample))}"] if prod(batch) > 1 else []
            yield ", ".join(names + ([f"head {h}"] if H > 1 else [])), given.at(tuple(sample)).heads(h, h + 1)


def _draw_mask(ax: "Axes", one: Mask, T: int, S: int, rows: int, cols: int) -> None:
    from matplotlib.patches import Rectangle

    dense = np.broadcast_to(host(one.dense(T, S)), (*one.shape(T, S)[:-2], T, S)).reshape(T, S)
    for i in range(0, T, rows):
        for j in range(0, S, cols):
            stop = min(i + rows, T), min(j + cols, S)
            colour = BLOCKS[one.block((i, stop[0]), (j, stop[1]))]
            size = stop[1] - j, stop[0] - i
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), *size, facecolor=colour, edgecolor=GREY, linewidth=0.8))
    query, key = np.nonzero(dense)
    side = max(0.5, min(4.0, 110 / max(T, S)))
    ax.plot(key, query, "s", color=DARK, markersize=side, markeredgewidth=0)
    ax.set_xlim(-0.5, S - 0.5)
    ax.set_ylim(T - 0.5, -0.5)
    ax.set_aspect("equal")


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────


@_by_matplotlib
def weights(cache: Any, *, sample: int | tuple[int, ...] = 0) -> "Figure":
    """The weights of each head of one sample, from the cache of an attention: white 0, dark blue the head's largest

    `sample` is an index of the batch. The title of a head says its largest weight, and the mean entropy of its rows in
    units of that of equal weights: 0 where each query attends to one key, 1 where to all alike.
    """
    p = host(attention_weights(cache))
    p = p if p.ndim > 2 else p[None]
    for index in (sample,) if isinstance(sample, int) else sample:
        p = p[index] if p.ndim > 3 else p
    if p.ndim != 3:
        raise ValueError(f"sample must have an index for each of the {p.ndim - 3} batch axes left, got {sample!r}")
    shown = p[:HEADS]
    figure, axes = _grid(len(shown), 2.6, "queries i", "keys j")
    for h, (one, ax) in enumerate(zip(shown, axes, strict=True)):
        image = ax.imshow(one, cmap="Blues", vmin=0, vmax=max(one.max(initial=0.0), 1e-30), interpolation="nearest")
        ax.set_title(f"head {h}   max {one.max(initial=0.0):.2f}   entropy {_entropy(one):.2f}", fontsize=8)
        figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03).ax.tick_params(labelsize=6)
    return figure


def _entropy(p: Array) -> float:
    """Of the rows, in units of log S; of a row that a sink has taken weight from, as if it had not"""
    total = p.sum(axis=-1, keepdims=True)
    q = p / np.where(total > 0, total, 1.0)
    rows = -(q * np.log(np.where(q > 0, q, 1.0))).sum(axis=-1)[total[:, 0] > 0]
    return float(rows.mean() / np.log(p.shape[-1])) if rows.size and p.shape[-1] > 1 else 0.0


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────


@_by_matplotlib
def parameters(params: Params, *, title: str = "") -> "Figure":
    """The root mean square of each head of each projection, and below how the numbers of each head are spread

    Dead heads, heads that have grown, and projections of another scale are seen at once. Histograms are in units of
    the root mean square of the whole projection, one line for each head; what is beyond 4 counts at the ends.
    """
    sizes(params)
    names = [name for name in ("q_proj", "k_proj", "v_proj", "out_proj") if name in params]
    figure = _figure(3.0 * len(names), 5.2)
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        of_heads = _of_heads(name, host(params[name]["w"]))
        _draw_norms(axes[0][column], name, of_heads)
        _draw_histograms(axes[1][column], of_heads)
    axes[0][0].set_ylabel("root mean square of w")
    axes[1][0].set_ylabel("share of the numbers")
    figure.suptitle(title, fontsize=10)
    return figure


def _of_heads(name: str, w: Array) -> Array:
    """(H or K, numbers of a head)"""
    axis = next(i for i, letter in enumerate(SPEC[f"{name}.w"].split()) if letter in "HK")
    return np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)


def _draw_norms(ax: "Axes", name: str, of_heads: Array) -> None:
    from matplotlib.ticker import MaxNLocator

    rms = np.sqrt((of_heads**2).mean(axis=1))
    ax.bar(np.arange(len(rms)), rms, color=BLUE, width=0.8)
    ax.axhline(np.sqrt((rms**2).mean()), color=ORANGE, linewidth=1, label="of all heads")
    ax.set_title(name, fontsize=9)
    ax.set_xlabel("head" if name in ("q_proj", "out_proj") else "key/value head", fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, max(1.25 * float(rms.max(initial=0.0)), 1e-30))
    ax.legend(fontsize=7, frameon=False, loc="upper right")


def _draw_histograms(ax: "Axes", of_heads: Array) -> None:
    from matplotlib import colormaps

    scale = max(float(np.sqrt((of_heads**2).mean())), 1e-300)
    edges = np.linspace(-4, 4, 41)
    for h, numbers in enumerate(of_heads):
        count, _ = np.histogram(np.clip(numbers / scale, -4, 4), edges)
        colour = colormaps["viridis"](0.85 * h / max(len(of_heads) - 1, 1))
        label = f"head {h}" if h in (0, len(of_heads) - 1) else None
        ax.stairs(count / max(numbers.size, 1), edges, color=colour, label=label)
    ax.set_xlabel("w / root mean square", fontsize=8)
    ax.legend(fontsize=7, frameon=False, loc="upper right")


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


@_by_matplotlib
def errors(rows: Sequence["Row"]) -> "Figure":
    """The largest error of each value of `verify`, in units of its bound and of its tolerance, on a logarithmic scale

    Left of the line at 1 a value agrees. What fails is orange, and so is a value that is not a number, at the edge.
    """
    problems = list(dict.fromkeys((row.problem, row.dtype) for row in rows))
    of_problem = [[row for row in rows if (row.problem, row.dtype) == problem] for problem in problems]
    figure = _figure(9.0, 1.0 + 0.24 * len(rows) + 0.7 * len(problems))
    axes = figure.subplots(
        len(problems), 1, squeeze=False, sharex=True, height_ratios=[len(some) + 1 for some in of_problem]
    )
    for ax, problem, some in zip(axes[:, 0], problems, of_problem, strict=True):
        _draw_errors(ax, some)
        ax.set_title(", ".join(problem), fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("largest error / what is allowed")
    _legend_of_errors(figure)
    return figure


MARKS = {"over the tolerance": ("D", GREY), "over the bound": ("o", BLUE)}


def _draw_errors(ax: "Axes", rows: Sequence["Row"]) -> None:
    least, most = 1e-7, 1e3
    for y, row in enumerate(rows):
        for ratio, (marker, colour) in zip((row.of_tolerance, row.of_bound), MARKS.values(), strict=True):
            x = min(max(ratio, least), most) if ratio == ratio else most
            fails = not ratio <= 1
            ax.plot(x, y, marker, color=ORANGE if fails else colour, markeredgecolor=DARK, markeredgewidth=0.5)
    ax.set_yticks(range(len(rows)), [row.quantity for row in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.set_xlim(least / 2, most * 2)
    ax.axvline(1, color=DARK, linewidth=1)
    ax.grid(axis="y", color=GREY, linewidth=0.4)


def _legend_of_errors(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    shown = {**MARKS, "fails": ("s", ORANGE)}
    marks = [
        Line2D([], [], linestyle="", marker=mark, color=colour, markeredgecolor=DARK, markeredgewidth=0.5, label=name)
        for name, (mark, colour) in shown.items()
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def errors_html(rows: Sequence["Row"], *, title: str, lines: Sequence[str]) -> str:
    """A page of one file: the lines, the picture of `errors`, and a table of all values; it fetches nothing"""
    names = ("problem", "dtype", "quantity", "shape", "worst error", "error / tolerance", "error / bound", "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "\n".join(_row_html(row) for row in rows)
    text = "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{text}"
        f'<div class="wide">{svg(errors(rows))}</div>\n'
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'
        f"</body>\n</html>\n"
    )


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 960px; margin: 2em auto;
  padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: left; border-bottom: 1px solid #d0d7de; white-space: nowrap }
td.number { text-align: right } tr.fails { background: #fbe3d4; font-weight: bold }
.wide { overflow-x: auto } svg { max-width: 100%; height: auto }
"""


def _row_html(row: "Row") -> str:
    shape = " × ".join(map(str, row.shape))
    texts = "".join(f"<td>{html.escape(text)}</td>" for text in (row.problem, row.dtype, row.quantity, shape))
    numbers = (f"{row.error:.1e}", f"{row.of_tolerance:.3f}", f"{row.of_bound:.3f}")
    texts += "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f'<tr class="{"ok" if row.ok else "fails"}">{texts}<td>{"ok" if row.ok else "FAILS"}</td></tr>'


def svg(figure: "Figure") -> str:
    """The figure as an element of a page: the same text for the same figure"""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "funcmha", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)  # inches
    return Figure(figsize=(width, height), layout=layout, dpi=120)


def _grid(n: int, side: float, ylabel: str, xlabel: str) -> tuple["Figure", list["Axes"]]:
    """n panels in rows of four, labelled at the left and below"""
    across = max(min(n, 4), 1)
    down = ceil(max(n, 1) / across)
    figure = _figure(max(side * across + 0.6, 5.4), side * down + 1.0)
    every = figure.subplots(down, across, squeeze=False).ravel()
    for i, ax in enumerate(every):
        ax.tick_params(labelsize=7)
        if i >= n:
            ax.remove()
            continue
        ax.set_ylabel(ylabel if i % across == 0 else "", fontsize=8)
        ax.set_xlabel(xlabel if i + across >= n else "", fontsize=8)
    return figure, list(every[:n])


def _legend(figure: "Figure", colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, edgecolor=DARK, linewidth=0.5, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
