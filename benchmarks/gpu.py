"""python -m benchmarks.gpu: what only a GPU can tell of funcmha with CuPy arrays, in four minutes at most.

    errors     of the specification and of the batched engine, forward and gradients, against NumPy in float64
    waits      whether a call returns while the device is still busy with what came before it
    memory     the most that forward and gradients hold beside their inputs, by length
    time       of forward and gradients; as a share of the card's own matrix product, and beside PyTorch's attention

`python -m pytest -m gpu` runs the tests that need one. Without a GPU nothing is measured, and this says so.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from funcmha import attention, attention_vjp

from . import table

MINUTES = 4
ENGINES = ("sequential", "batched")
DTYPES = ("float16", "float32", "float64")
WRONG = 64  # ulps of the largest number wanted: ten times what is to be expected


class Size(NamedTuple):
    B: int
    H: int
    T: int
    D: int

    def __str__(self) -> str:
        return f"{self.B} × {self.H} × {self.T} × {self.D}"

    @property
    def operations(self) -> int:
        """Of forward and gradients: seven products of T × T by D."""
        return 7 * 2 * self.B * self.H * self.T**2 * self.D


SIZES = (Size(16, 8, 64, 64), Size(4, 8, 256, 64), Size(2, 8, 512, 64), Size(1, 8, 1024, 64), Size(1, 8, 2048, 64),
         Size(1, 4, 4096, 128))  # fmt: skip
SMALL = tuple(Size(2, 3, T, 8) for T in (3, 5, 7, 11, 13, 17))


class Run(NamedTuple):
    cp: Any  # the module cupy
    sizes: tuple[Size, ...]
    product: int  # rows of the matrix product
    least: float  # seconds of a measurement
    deadline: float

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, by the clock of the device: a first call, then as many as take `least` seconds."""
        start, stop, calls, taken = self.cp.cuda.Event(), self.cp.cuda.Event(), 1, 0.0
        call()
        while True:
            start.record()
            for _ in range(calls):
                call()
            stop.record()
            stop.synchronize()
            taken = self.cp.cuda.get_elapsed_time(start, stop) / 1000
            if taken >= self.least or self.late():
                return taken / calls
            calls *= 2

    def drawn(self, size: Size) -> list[np.ndarray]:
        """q, k, v and do of numbers that every dtype has."""
        rng = np.random.default_rng(size.T)
        return [rng.standard_normal(size).astype(np.float16) for _ in range(4)]

    def moved(self, size: Size, dtype: str) -> list[Any]:
        return [self.cp.asarray(a.astype(dtype)) for a in self.drawn(size)]


def both(q: Any, k: Any, v: Any, do: Any, engine: str | None) -> list[Any]:
    """o and the gradients of q, k and v."""
    o, cache = attention(q, k, v, engine=engine)
    return [o, *attention_vjp(cache, do)[:3]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    small = parser.parse_args(arguments).small
    sizes, product, least = (SMALL, 64, 1e-3) if small else (SIZES, 8192, 0.2)
    run = Run(_cupy(), sizes, product, least, time.monotonic() + 60 * MINUTES)
    _describe(run.cp)
    parts: dict[str, Callable[[Run], Iterator[list[str]]]] = {
        "size, dtype, engine | o | dq | dk | dv | ": errors,
        "size, engine | waits for the device": waits,
        "length, engine | held beside inputs | bytes a score": memory,
        "size, dtype | batched | of matrix product | PyTorch | to PyTorch": times,
    }
    for columns, part in parts.items():
        table.show(str(part.__doc__), columns.split(" | "), list(part(run)))
    if run.late():
        print(f"\nThe {MINUTES} minutes were over before the end: rows are missing.")


def _cupy() -> Any:
    try:
        cp = importlib.import_module("cupy")
    except ModuleNotFoundError:
        raise SystemExit("No GPU: CuPy is not installed. Nothing was measured.") from None
    if not cp.is_available():
        raise SystemExit("No GPU: CuPy finds no CUDA device. Nothing was measured.")
    return cp


def _describe(cp: Any) -> None:
    card = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    print(f"card   {card['name'].decode()}\ncupy   {cp.__version__}\nnumpy  {np.__version__}")


def errors(run: Run) -> Iterator[list[str]]:
    """Largest error, to the largest number of NumPy's result in float64"""
    for size in run.sizes:
        wanted = both(*(a.astype(np.float64) for a in run.drawn(size)), engine=None)
        for dtype in DTYPES:
            for engine in ENGINES:
                if not run.late():
                    yield _error(run, size, dtype, engine, wanted)


def _error(run: Run, size: Size, dtype: str, engine: str, wanted: list[np.ndarray]) -> list[str]:
    name = f"{size} {dtype} {engine}"
    try:
        got = [run.cp.asnumpy(a).astype(np.float64) for a in both(*run.moved(size, dtype), engine=engine)]
    except MemoryError:
        return [name, "", "", "", "", "out of memory"]
    found = [float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, wanted, strict=True)]
    good = all(e <= WRONG * np.finfo(dtype).eps for e in found)
    return [name, *(f"{e:.1e}" for e in found), "" if good else "WRONG"]


def waits(run: Run) -> Iterator[list[str]]:
    """A call after a long matrix product returns before that has ended, unless it waits"""
    for size in run.sizes:
        for engine in ENGINES:
            if not run.late():
                arrays = run.moved(size, "float32")
                both(*arrays, engine=engine)  # which takes memory from the driver, and compiles
                yield [f"{size} {engine}", "yes" if _waits(run, arrays, engine) else "no"]
                run.cp.cuda.Device().synchronize()


def _waits(run: Run, arrays: list[Any], engine: str) -> bool:
    busy, event = run.cp.zeros((run.product, run.product), dtype="float32"), run.cp.cuda.Event()
    for _ in range(4):
        busy = busy @ busy
    event.record()
    both(*arrays, engine=engine)
    return bool(event.done)


def memory(run: Run) -> Iterator[list[str]]:
    """The most that forward and gradients in float32 hold, inputs and results left out"""
    pool, first = run.cp.get_default_memory_pool(), run.sizes[-2]
    for engine in ENGINES:
        for doubled in range(-2, 3):
            size = first._replace(T=max(int(first.T * 2.0**doubled), 1))
            if run.late():
                return
            arrays = run.moved(size, "float32")
            pool.free_all_blocks()
            before = pool.total_bytes()
            try:
                results = both(*arrays, engine=engine)
            except MemoryError:
                yield [f"{size.T} {engine}", "out of memory", ""]
                break
            held = pool.total_bytes() - before - sum(a.nbytes for a in results)
            yield [f"{size.T} {engine}", table.megabytes(held), f"{held / (size.B * size.H * size.T**2):.1f}"]
            del results


def times(run: Run) -> Iterator[list[str]]:
    """Forward and gradients"""
    for dtype in DTYPES:
        square = run.cp.asarray(np.random.default_rng(0).standard_normal((run.product,) * 2).astype(dtype))
        rate = 2 * run.product**3 / run.seconds(lambda square=square: square @ square)
        for size in run.sizes:
            if not run.late():
                yield _times(run, size, dtype, rate)


def _times(run: Run, size: Size, dtype: str, rate: float) -> list[str]:
    arrays = run.moved(size, dtype)
    try:
        ours = run.seconds(lambda: both(*arrays, engine="batched"))
    except MemoryError:
        return [f"{size} {dtype}", "out of memory", "", "", ""]
    theirs = _of_torch(run, size, dtype)
    share = f"{100 * size.operations / ours / rate:.0f} %"
    told = "not there" if theirs is None else table.seconds(theirs)
    return [f"{size} {dtype}", table.seconds(ours), share, told, table.ratio(ours, theirs)]


def _of_torch(run: Run, size: Size, dtype: str) -> float | None:
    """Seconds of PyTorch's own attention on the card, if it is there."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        return None
    if not torch.cuda.is_available():
        return None
    *inputs, do = (torch.tensor(a.astype(dtype), device="cuda") for a in run.drawn(size))
    for x in inputs:
        x.requires_grad_()

    def call() -> None:
        o = torch.nn.functional.scaled_dot_product_attention(*inputs)
        torch.autograd.grad(o, inputs, do)

    return run.seconds(call)  # on the stream that both libraries have by default


if __name__ == "__main__":
    main()
