"""What attention on many ranks will cost, without arrays: by the schedule that the ranks run.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; B samples.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha.masks import Mask, as_mask

from .line import RING, Layout, check_heads, placed
from .schedule import Ways, pairs, steps

SMALL = 256  # rows and columns of a block whose booleans are counted, not halved
FULL_PRECISION = 4  # bytes at least of what is added up


class Cost(NamedTuple):
    """What the ranks do and need, forward and backward; every array (ranks,)."""

    layout: Layout
    tokens: np.ndarray  # queries of each rank
    pairs: np.ndarray  # of query and key that are attended, in one head of one sample
    flops: np.ndarray
    sent: np.ndarray  # bytes of keys, values and their gradients, and between heads
    memory: np.ndarray  # bytes of inputs, outputs, gradients, and what is on its way
    steps: np.ndarray  # parts that come by
    compute: np.ndarray  # seconds
    transfer: np.ndarray  # seconds

    @property
    def balance(self) -> float:
        """The mean of the flops over their maximum: 1 where nobody waits"""
        most = self.flops.max(initial=0.0)
        return float(self.flops.mean() / most) if most else 1.0

    @property
    def seconds(self) -> float:
        """Of the slowest rank, whose transfers are hidden as far as computation lasts"""
        return float(np.maximum(self.compute, self.transfer).max(initial=0.0))

    @property
    def efficiency(self) -> float:
        """Of all ranks together, as a share of what they could do in that time"""
        return float(self.compute.mean() / self.seconds) if self.seconds else 1.0

    def __str__(self) -> str:
        """A table of a few lines"""
        u, r = self.layout.heads, self.layout.ring
        rows = [
            ("ranks", f"{self.layout.ranks}: {u} for heads, {r} in a ring, {self.layout.scheme}"),
            ("queries of a rank", f"{self.tokens.min()} … {self.tokens.max()}"),
            ("balance", f"{self.balance:.3f}"),
            ("flops of a rank", f"{self.flops.max():.3g}"),
            ("sent by a rank", f"{self.sent.max() / 1e9:.3g} GB"),
            ("memory of a rank", f"{self.memory.max() / 1e9:.3g} GB"),
            ("parts that come by", f"{self.steps.max()}"),
            ("computation", f"{self.compute.max():.3g} s"),
            ("transfers", f"{self.transfer.max():.3g} s"),
            ("time", f"{self.seconds:.3g} s, {100 * self.efficiency:.0f} % of what the ranks could do"),
        ]
        return "\n".join(f"{name:<20}{value}" for name, value in rows)

    def plot(self, axes: Any = None) -> Any:
        """Draw how long each rank computes and transfers, on these axes of matplotlib or new ones, and return them

            cost.plot().figure.savefig("plan.png")

        What lies between a bar and the line is waiting; a tick above it is a transfer that computation does not hide.
        Raises ImportError without matplotlib.
        """
        axes, (scheme, r, u), n = _new_axes() if axes is None else axes, self.layout, self.layout.ranks
        ranks, width = np.arange(n), 0.9 if n <= 64 else 1.0
        ends = ranks - width / 2, ranks + width / 2
        drawn = [
            axes.bar(ranks, self.compute, width, color="#56b4e9", label="computation"),
            axes.hlines(self.transfer, *ends, color="#d55e00", linewidth=2, label="transfers"),
            axes.axhline(self.seconds, color="black", linewidth=1, linestyle="--", label="time"),
        ]
        axes.set_title(f"{n} ranks, {u} for heads × {r} in a ring, {scheme}: {100 * self.efficiency:.0f} % in use")
        axes.set_xlabel("rank")
        axes.set_ylabel("seconds, forward and backward")
        axes.set_xlim(-1, self.layout.ranks)
        axes.set_ylim(0, 1.25 * self.seconds or 1.0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(handles=drawn, loc="upper right", ncols=3, frameon=False)
        return axes


def _new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib ({error}): pip install 'funcmha[plot]'") from error
    return Figure(figsize=(8, 4), layout="constrained").subplots()


def plan(
    *, T: int, S: int | None = None, H: int, K: int | None = None, D: int, E: int | None = None, B: int = 1,
    ranks: int, heads: int = 1, scheme: str = "zigzag", mask: Any = None, itemsize: int = 2, flops: float = 1e12,
    bandwidth: float = 1e10, saturated: bool = False,
) -> Cost:  # fmt: skip
    """The cost of `parallel.attention` and its vjp on so many ranks, of which none need exist

    ranks, heads   as of `grid`: ranks / heads in a ring, of this scheme
    mask           of T queries and S keys; one of `funcmha.masks` costs no T × S
    itemsize       bytes of a number as it travels: 2 for half types
    flops          per second, of one rank
    bandwidth      bytes per second, from one rank to the next
    saturated      whether rows everywhere have a key with more than half of the weight: then the gradient takes one
                   round more of the keys and values. Where there are some such rows it takes a part of that

    Pairs, bytes and steps are those that the ranks run, from the same schedule. Time is a model: computation of the
    pairs at this rate, and transfers of these bytes, hidden as far as it lasts; latency is none.
    """
    sizes = {"T": T, "S": T if S is None else S, "H": H, "K": H if K is None else K, "D": D, "E": D if E is None else E}
    sizes = {name: _check.integer(name, n, 0 if name in "TS" else 1) for name, n in sizes.items()}
    T, S, H, K, D, E = sizes.values()
    _check.multiple("q", H, "k", K)
    B, ranks, heads = (_check.integer(name, n, 1) for name, n in (("B", B), ("ranks", ranks), ("heads", heads)))
    itemsize = _check.integer("itemsize", itemsize, 1)
    flops, bandwidth = (_positive(name, x) for name, x in (("flops", flops), ("bandwidth", bandwidth)))
    if scheme not in RING:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, RING))}, got {scheme!r}")
    if ranks % heads:
        raise ValueError(f"heads must divide the number of ranks, {ranks}, got {heads}")
    layout = Layout(scheme, ranks // heads, heads)
    check_heads(layout, H, K)
    mask = None if mask is None else as_mask(mask)
    if mask is not None:
        mask.shape(T, S)
    _check.flag("saturated", saturated)
    return _cost(layout, sizes, B, mask, itemsize, flops, bandwidth, rounds=3 if saturated else 2)


def _positive(name: str, x: Any) -> float:
    value = _check.number(name, x)
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


def _cost(
    layout: Layout, sizes: dict[str, int], B: int, mask: Mask | None, itemsize: int, flops: float, bandwidth: float,
    rounds: int,
) -> Cost:  # fmt: skip
    T, S, H, K, D, E = sizes.values()
    u, r = layout.heads, layout.ring
    of_ring = [_of_rank(layout, ring, T, S, mask) for ring in range(r)]
    ways = Ways.of(np.array([need for need, _ in of_ring]))
    travel = np.array([_travelled(layout, ring, ways, S) for ring in range(r)])  # rows sent forward, home; steps
    own_pairs = np.repeat([n for _, n in of_ring], u)
    tokens = np.array([layout.num_tokens(T, rank) for rank in range(layout.ranks)])
    own_keys = np.array([layout.num_tokens(S, rank) for rank in range(layout.ranks)])
    rows, home, arrivals = (np.repeat(column, u) for column in travel.T)
    wide, of_key = max(itemsize, FULL_PRECISION), B * K // u * (D + E)
    sent = of_key * (rounds * rows * itemsize + home * wide)
    ring_rows, ring_keys = (np.repeat([layout.ring_count(n, ring) for ring in range(r)], u) for n in (T, S))
    to_heads = B * (u - 1) * (D + E) * (H // u * tokens + K // u * own_keys)  # q, k and v, and do
    from_heads = B * (D + E) * (H // u * (ring_rows - tokens) + K // u * (ring_keys - own_keys))  # o, dq, dk and dv
    sent = sent + (to_heads + from_heads) * itemsize + B * H // u * (ring_rows - tokens) * wide  # and lse
    largest = max((layout.ring_count(S, ring) for ring in range(r)), default=0)
    held = B * H // u * (D + E) * ring_rows * (itemsize + wide) + of_key * ring_keys * (itemsize + wide)
    held = held + (r > 1) * of_key * largest * 2 * (itemsize + wide)
    of_pair = 2.0 * (D + E) + (6 * D + 4 * E)  # q kᵀ and a v; and q kᵀ again, do vᵀ, dv, dk and dq
    of_pair += (rounds - 2) * 2 * (D + E)  # q kᵀ and do vᵀ
    work = of_pair * B * (H // u) * own_pairs
    return Cost(layout, tokens, own_pairs, work, sent, held, arrivals, work / flops, sent / bandwidth)


def _of_rank(layout: Layout, ring: int, T: int, S: int, mask: Mask | None) -> tuple[np.ndarray, int]:
    """Which parts a rank of the ring needs, and the pairs of query and key that it attends"""
    queries = placed(layout.ring_pieces(T, ring))
    counts = [
        [
            _count(pair.mask, (0, len(pair.rows)), (0, len(pair.cols)))
            for pair in pairs(queries, layout, source, S, mask)
        ]
        for source in range(layout.ring)
    ]
    return np.array([bool(some) for some in counts]), sum(map(sum, counts))


def _travelled(layout: Layout, ring: int, ways: Ways, S: int) -> tuple[int, int, int]:
    """Rows of keys that a rank sends on, rows of their gradients that it sends on or home, parts that come by"""
    all_steps = steps(ring, ways)
    on = sum(layout.ring_count(S, step.source) for step in all_steps if step.leaves)
    home = sum(layout.ring_count(S, step.source) for step in all_steps if step.carries)
    return on, home, sum(step.arrives for step in all_steps[1:])


def _count(mask: Mask | None, rows: tuple[int, int], cols: tuple[int, int]) -> int:
    """How many pairs a mask allows, in any sample and head: by halves, where it is mixed"""
    area = (rows[1] - rows[0]) * (cols[1] - cols[0])
    answer = "full" if mask is None else mask.block(rows, cols)
    if mask is None or answer != "mixed":
        return area if answer == "full" else 0
    if max(rows[1] - rows[0], cols[1] - cols[0]) <= SMALL:
        allowed = mask.tile(rows, cols)
        some = allowed.any(axis=tuple(range(allowed.ndim - 2)))
        return int(np.count_nonzero(np.broadcast_to(some, (rows[1] - rows[0], cols[1] - cols[0]))))
    return sum(_count(mask, r, c) for r in _halves(rows) for c in _halves(cols))


def _halves(some: tuple[int, int]) -> list[tuple[int, int]]:
    start, stop = some
    if stop - start <= SMALL:
        return [some]
    middle = (start + stop + 1) // 2
    return [(start, middle), (middle, stop)]
