"""cuDNN's own definition of attention, run on a CPU in float64.

cuDNN is two libraries. The front end, `nvidia-cudnn-frontend`, takes `graph.sdpa(...)` apart into products, pointwise
operations and reductions, and hands these to the back end, libcudnn, whose engines fuse them into a kernel. Below
version 9.21 of the back end nothing is left for it to define: the scale, bias, masks, softmax, sink, dropout, and all
of the gradient, come as operations of few attributes each. So here is a back end that has no kernels: it claims to be
version 9.20, takes the descriptors of the operations, and computes each as it is documented, with float64 tensors of
PyTorch. Everything else is NVIDIA's compiled code: the checks, the expansion, the slopes, the scalars.

What it cannot show is where the engines differ from the operations that they are given, as they must in three places:
of fully masked rows the operations make NaN, where the documentation has 0, and the gradient of a sink has the
wrong sign (`test_interop_cudnn_graph.py` has both); and the row maximum beside a sink is declared as wide as the scores
(`reduction`).

Axes: B batch, H heads, T queries, S keys, D width; a matrix product is (M, K) by (K, N).
"""

import atexit
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import torch
from cudnn_graphs import Library

VERSION = 92000  # at 92100 softmax and the diagonal band become operations of their own, for the engines to know

# Numbers of cudnn_graph_v9.h. Of the kinds of descriptors, with the attributes that hold their operands:
POINTWISE, MATMUL, REDUCTION, RESHAPE, RNG = 13, 19, 22, 31, 33
POINTWISE_CONFIG, POINTWISE_X, POINTWISE_B, POINTWISE_Y = 750, 751, 752, 753
POINTWISE_DX, POINTWISE_DY, POINTWISE_PREDICATE = 756, 757, 758
MATMUL_A, MATMUL_B, MATMUL_C, MATMUL_CONFIG, MATMUL_M, MATMUL_N, MATMUL_K = 1520, 1521, 1522, 1523, 1525, 1526, 1527
REDUCTION_X, REDUCTION_Y, REDUCTION_CONFIG = 1610, 1611, 1612
RESHAPE_X, RESHAPE_Y = 2200, 2201
RNG_Y, RNG_SEED, RNG_CONFIG, RNG_OFFSET = 2310, 2311, 2312, 2313
# of their options,
MODE, AXIS, MATMUL_PADDING, REDUCTION_MODE, BERNOULLI = 0, 9, 1503, 1600, 2305
ADD, MAX = 0, 3
# of tensors and of what they are bound to,
DTYPE, DIMS, STRIDES, UID, BY_VALUE, RAGGED = 901, 902, 903, 906, 908, 913
IDS, ADDRESSES = 1000, 1001
# and of the types of values.
TYPES = {2: ctypes.c_bool, 3: ctypes.c_int64, 4: ctypes.c_float, 5: ctypes.c_double, 6: ctypes.c_void_p}
DESCRIPTOR = 15
POINTERS = {0, 6, DESCRIPTOR}
DTYPES = {0: np.float32, 1: np.float64, 2: np.float16, 4: np.int32, 10: np.int64, 11: np.bool_}
STORED = {0: torch.float32, 2: torch.float16, 9: torch.bfloat16}

BINARY = {
    0: torch.add,
    1: torch.mul,
    2: torch.minimum,
    3: torch.maximum,
    6: torch.div,
    9: torch.sub,
    300: torch.eq,
    301: torch.ne,
    302: torch.gt,
    303: torch.ge,
    304: torch.lt,
    305: torch.le,
    400: torch.logical_and,
    401: torch.logical_or,
}
UNARY = {13: torch.exp, 15: torch.log, 16: torch.neg, 21: torch.clone, 22: torch.reciprocal, 101: torch.tanh}
TANH_BACKWARD, INDEX, SELECT = 201, 501, 601


# ── the operations ───────────────────────────────────────────────────────────────────────────────────────────────


def pointwise(op, read):
    """y = f(x, b), where sizes of 1 broadcast"""
    config = op.of(POINTWISE_CONFIG)
    mode = config.one(MODE)
    if mode == INDEX:
        x, axis = op.of(POINTWISE_X), config.one(AXIS)
        return torch.arange(x[DIMS][axis]).reshape([-1 if a == axis else 1 for a in range(4)]).expand(x[DIMS])
    if mode == SELECT:
        return torch.where(read(op.of(POINTWISE_PREDICATE)), read(op.of(POINTWISE_X)), read(op.of(POINTWISE_B)))
    if mode == TANH_BACKWARD:
        return read(op.of(POINTWISE_DY)) * (1 - torch.tanh(read(op.of(POINTWISE_X))) ** 2)
    return (
        BINARY[mode](read(op.of(POINTWISE_X)), read(op.of(POINTWISE_B)))
        if mode in BINARY
        else UNARY[mode](read(op.of(POINTWISE_X)))
    )


def matmul(op, read):
    """c = a b, with heads of b repeated, of the first m rows, k terms and n columns of each sample"""
    a, b = read(op.of(MATMUL_A)), read(op.of(MATMUL_B))
    b = b.repeat_interleave(a.shape[1] // b.shape[1], dim=1)
    m, n, k = (op.sizes(name, read) for name in (MATMUL_M, MATMUL_N, MATMUL_K))
    if k is not None:
        terms = torch.arange(a.shape[3]) < k
        a, b = torch.where(terms, a, 0.0), torch.where(terms.mT, b, 0.0)
    c, padding = a @ b, op.of(MATMUL_CONFIG).get(MATMUL_PADDING, [0.0])[0]
    c = c if m is None else torch.where((torch.arange(c.shape[2]) < m).mT, c, padding)
    return c if n is None else torch.where(torch.arange(c.shape[3]) < n, c, padding)


def reduction(op, read):
    """y = Σ x or max x over the axes that y has 1 of; where it has m of n, over groups of n / m neighbours"""
    x, dims, mode = read(op.of(REDUCTION_X)), op.of(REDUCTION_Y)[DIMS], op.of(REDUCTION_CONFIG).one(REDUCTION_MODE)
    if mode == MAX and dims == list(x.shape):
        dims = [*dims[:3], 1]  # of the row maximum beside a sink, which the front end does not declare
    groups = x.reshape([size for n, m in zip(x.shape, dims, strict=True) for size in (m, n // m)])
    reduce = {ADD: torch.sum, MAX: torch.amax}[mode]
    return reduce(groups, dim=(1, 3, 5, 7))


def reshape(op, read):
    """The same memory with the last two axes exchanged, the only use that attention has for it"""
    x, y = op.of(RESHAPE_X), op.of(RESHAPE_Y)
    assert y[DIMS] == [*x[DIMS][:2], x[DIMS][3], x[DIMS][2]]
    assert y[STRIDES] == [*x[STRIDES][:2], x[STRIDES][3], x[STRIDES][2]]
    return read(x).mT


def rng(op, read):
    """1 with the probability p, else 0: cuDNN's own stream is unknown, so this one starts at seed + offset"""
    seed = int(read(op.of(RNG_SEED))) + int(read(op.of(RNG_OFFSET)))
    drawn = np.random.default_rng(seed).random(op.of(RNG_Y)[DIMS]) < op.of(RNG_CONFIG).one(BERNOULLI)
    return torch.tensor(drawn.astype(float))


OPERATIONS = {
    POINTWISE: (pointwise, POINTWISE_Y, POINTWISE_DX),
    MATMUL: (matmul, MATMUL_C),
    REDUCTION: (reduction, REDUCTION_Y),
    RESHAPE: (reshape, RESHAPE_Y),
    RNG: (rng, RNG_Y),
}


# ── descriptors, and the memory that they tell of ────────────────────────────────────────────────────────────────


class Descriptor(dict):
    """A descriptor of the back end: lists of values by the numbers of their attributes."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def of(self, name):
        return self[name][0]

    one = of

    def sizes(self, name, read):
        """The override of a product's size, (B, 1, 1, 1), if there is one"""
        return read(self.of(name)) if name in self else None


class Memory:
    """Storages by the ids of the tensors that the caller bound, and addresses of the front end's own.

    With `rounds` each result is rounded to the type that the graph gives it: once for each tensor that a kernel has.
    """

    def __init__(self, bound, pack, rounds):
        self.bound, self.rounds = bound, rounds
        self.addresses = dict(zip(pack[IDS], pack[ADDRESSES], strict=True))
        self.values = {}  # all that was computed, with its history for autograd
        self.given = []  # what the front end brought itself

    def read(self, tensor):
        uid, dims, strides = tensor.of(UID), tensor[DIMS], tensor[STRIDES]
        if uid in self.values:
            return self.values[uid]
        if uid not in self.bound:
            return self._own(tensor)
        if RAGGED not in tensor:
            x = self.bound[uid].as_strided(dims, strides)
            return x.double() if x.is_floating_point() else x
        flat = torch.cat([self.bound[uid], torch.full((dims[2] * max(strides),), torch.nan, dtype=torch.float64)])
        starts = self.read(tensor.of(RAGGED)).flatten().tolist()
        return torch.stack([flat.as_strided(dims[1:], strides[1:], start) for start in starts[: dims[0]]])

    def _own(self, tensor):
        """A scalar by value, or a table in the workspace: in float32 or int32, as NVIDIA's code left it"""
        dtype = np.dtype(DTYPES[tensor.of(DTYPE)])
        n = 1 if tensor.get(BY_VALUE) == [True] else prod(tensor[DIMS])
        raw = ctypes.string_at(self.addresses[tensor.of(UID)], n * dtype.itemsize)
        found = np.frombuffer(raw, dtype).reshape(tensor[DIMS])
        self.given.append(found)
        return torch.tensor(found.astype(np.float64 if dtype.kind == "f" else np.int64))

    def write(self, tensor, value, rows):
        """Where the tensor is bound, the first `rows` of each sample if it is ragged"""
        uid, dims, strides = tensor.of(UID), tensor[DIMS], tensor[STRIDES]
        if self.rounds and value.is_floating_point():
            value = value.to(STORED[tensor.of(DTYPE)]).double()
        self.values[uid] = value
        if uid not in self.bound:
            return
        assert list(value.shape) == dims, (value.shape, dims)
        if RAGGED not in tensor:
            self.bound[uid].as_strided(dims, strides).copy_(value.detach())
            return
        starts = self.read(tensor.of(RAGGED)).flatten().tolist()
        for x, start, n in zip(value, starts, rows.flatten().tolist(), strict=False):
            self.bound[uid].as_strided([dims[1], n, dims[3]], strides[1:], start).copy_(x[:, :n].detach())


def compute(operations, memory):
    """Each operation in turn. In a ragged tensor rows are written that the last product had."""
    rows = None
    for op in operations:
        f, *outputs = OPERATIONS[op.kind]
        (output,) = (name for name in outputs if name in op)
        if op.kind == MATMUL:
            rows = op.sizes(MATMUL_M, memory.read)
        memory.write(op.of(output), f(op, memory.read), rows)


# ── the back end ─────────────────────────────────────────────────────────────────────────────────────────────────

ENGINE, CONFIG, PLAN_CONFIG, PLAN_WORKSPACE, CONFIG_WORKSPACE = 1301, 300, 401, 402, 303
HEURISTIC_GRAPH, HEURISTIC_RESULTS, ENGINE_COUNT, SHARED_MEMORY, OPS = 201, 202, 802, 304, 801
GRAPH_OF = "graph"


class Backend:
    """One engine, which takes every graph."""

    def __init__(self):
        self.descriptors, self.bound, self.rounds, self.memory, self.error, self.created = {}, {}, False, None, None, 0
        self.calls = [self._safely(f) for f in (self.create, self.set, self.get, self.execute)]

    def run(self, cudnn, handle, graph, bound, rounds=False):
        """The graph, with a storage for each of its tensors that are not virtual. Returns the memory of what it did."""
        self.rounds = rounds
        self.bound, self.error = {t.get_uid(): x for t, x in bound.items()}, None
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A])
            graph.check_support()
            graph.build_plans()
            workspace = ctypes.create_string_buffer(max(graph.get_workspace_size(), 1))
            address = ctypes.addressof(workspace)
            graph.execute(dict.fromkeys(self.bound, address), address, handle)
            return self.memory
        except RuntimeError:
            if self.error is not None:
                raise self.error from None
            raise
        finally:
            self.descriptors.clear()

    def create(self, kind, out, *_):
        self.created += 1
        number = 16 * self.created
        self.descriptors[number] = Descriptor(kind or 0)
        ctypes.c_void_p.from_address(out).value = number

    def set(self, number, name, kind, count, values, _):
        kind = kind or 0
        c_type = ctypes.c_void_p if kind in POINTERS else TYPES.get(kind, ctypes.c_int32)
        found = list((c_type * (count or 0)).from_address(values)) if count else []
        self.descriptors[number][name or 0] = [self.descriptors[x] for x in found] if kind == DESCRIPTOR else found

    def get(self, number, name, _, requested, count, out):
        me, n = self.descriptors[number], 1
        if name in (HEURISTIC_RESULTS, CONFIG):
            if out and requested:
                graph = me.of(HEURISTIC_GRAPH) if name == HEURISTIC_RESULTS else me[GRAPH_OF]
                self.descriptors[ctypes.c_void_p.from_address(out).value][GRAPH_OF] = graph
        elif name in (ENGINE, PLAN_WORKSPACE, CONFIG_WORKSPACE, ENGINE_COUNT):
            ctypes.c_int64.from_address(out).value = name == ENGINE_COUNT
        elif name == SHARED_MEMORY:
            ctypes.c_int32.from_address(out).value = 0
        else:  # notes and knobs, of which there are none
            n = 0
        if count:
            ctypes.c_int64.from_address(count).value = n

    def execute(self, _, plan, pack, *__):
        self.memory = Memory(self.bound, self.descriptors[pack], self.rounds)
        compute(self.descriptors[plan].of(PLAN_CONFIG)[GRAPH_OF][OPS], self.memory)

    def _safely(self, f):
        def status(*arguments):
            try:
                f(*arguments)
            except BaseException as error:  # which must not cross C, and is raised again in `run`
                self.error = error
                return 5000  # CUDNN_STATUS_EXECUTION_FAILED
            return 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 6)(status)


STORAGES = {"HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32, "INT32": torch.int32}


def missing():
    """Why `install` cannot work here, or None."""
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return "there is no C compiler for cudnn_backend.c" if shutil.which("cc") is None else None


@functools.cache
def install():
    """The front end over the back end above, for the rest of the process. Its tensors are float64."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "libcudnn_backend.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, Path(__file__).with_suffix(".c")], check=True)
    os.environ["CUDNN_FRONTEND_CUDART_LIB_NAME"] = str(path)
    library, backend = ctypes.CDLL(path), Backend()
    ctypes.c_longlong.in_dll(library, "version").value = VERSION
    for i, f in enumerate(backend.calls):
        (ctypes.c_void_p * 4).in_dll(library, "python")[i] = ctypes.cast(f, ctypes.c_void_p).value

    import cudnn

    cudnn._pybind_module._set_dlhandle_cudnn(library._handle)
    handle = cudnn.create_handle()
    return Library(
        cudnn=cudnn,
        handle=handle,
        run=functools.partial(backend.run, cudnn, handle),
        place=lambda name: {"dtype": torch.int64 if name == "INT32" else torch.float64},
        options={"sm_version": 90},
        forward={"implementation": cudnn.attention_implementation.COMPOSITE},  # the other is one operation
    )


def rounding(library, io):
    """The same with tensors of the type `io`, and each result rounded to the type that the graph gives it."""
    return library._replace(
        io=io, run=functools.partial(library.run, rounds=True), place=lambda name: {"dtype": STORAGES[name]}
    )
