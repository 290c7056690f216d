"""Graphs of cuDNN's `sdpa` and `sdpa_backward` from the arguments of `funcmha.interop.cudnn`, over any back end.

    graph, tensors, o, lse = forward(library, inputs, static)
    graph.run()
    graph.get(o)                                             # NumPy

A `Library` is the front end over a back end: that of `cudnn_backend.py`, or the real one with a GPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class Library(NamedTuple):
    cudnn: Any
    handle: Any
    run: Callable[[Any, dict[Any, torch.Tensor]], Any]  # (graph, storage of each tensor): builds and executes
    place: Callable[[str], dict[str, Any]]  # the name of a type: dtype and device of a storage
    options: dict[str, Any]  # of every graph
    forward: dict[str, Any]  # of every sdpa
    io: str = "HALF"  # the type of q, k, v, bias, o, do and their gradients


class Graph:
    """A graph, and the storages of its tensors, full of NaN where nothing was written."""

    def __init__(self, library):
        self.library, self.bound = library, {}
        types = library.cudnn.data_type
        self.graph = library.cudnn.pygraph(
            io_data_type=getattr(types, library.io),
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=library.handle,
            **library.options,
        )

    def tensor(self, a, name=None, wants_gradient=False):
        """An input in the layout of a, (B, H, T, D) or (B, T, H, D) in memory; None of None."""
        if a is None:
            return None
        name = name or ("INT32" if a.dtype.kind in "iu" else self.library.io)
        strides = dense(a.shape) if a.flags.c_contiguous else tokens_first(a.shape)
        storage = torch.empty(a.size, **self.library.place(name))
        storage.as_strided(a.shape, strides).copy_(torch.tensor(np.array(a)))
        t = self.graph.tensor(dim=list(a.shape), stride=strides, data_type=self._type(name))
        self.bound[t] = storage.requires_grad_(wants_gradient)
        return t

    def ragged(self, x, offset, B, S):
        """An input (N, H, D) of B sequences in (B, H, S, D), of which each begins at its offset."""
        N, H, D = x.shape
        shape = (B, H, S, D)
        t = self.graph.tensor(
            dim=list(shape), stride=tokens_first(shape), data_type=self._type(self.library.io), ragged_offset=offset
        )
        self.bound[t] = torch.tensor(x.reshape(N * H * D)).to(**self.library.place(self.library.io))
        return t

    def argument(self, a, name=None):
        """An output that is an argument of the node, of the shape of a."""
        if a is None:
            return None
        name = name or self.library.io
        t = self.graph.tensor(dim=list(a.shape), stride=dense(a.shape), data_type=self._type(name))
        return self.output(t, a.shape, name)

    def output(self, t, shape, name=None, offset=None, N=0):
        """An output that the node made, dense, or (N, H, D) where there is an offset for each sequence."""
        t.set_output(True).set_dim(list(shape)).set_stride(dense(shape) if offset is None else tokens_first(shape))
        name = name or self.library.io
        t.set_data_type(self._type(name))
        if offset is not None:
            t.set_ragged_offset(offset)
        size = int(np.prod(shape)) if offset is None else N * shape[1] * shape[3]
        self.bound[t] = torch.full((size,), torch.nan, **self.library.place(name))
        return t

    def run(self):
        self.memory = self.library.run(self.graph, self.bound)

    def get(self, t):
        """An output as a NumPy array in float64, None of None."""
        return None if t is None else self.flat(t).as_strided(t.get_dim(), t.get_stride()).numpy()

    def flat(self, t):
        return self.bound[t].detach().to("cpu", torch.float64)

    def _type(self, name):
        return getattr(self.library.cudnn.data_type, name)


def dense(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def tokens_first(shape):
    """The strides of (B, H, T, D) in memory that is (B, T, H, D)."""
    _, H, T, D = shape
    return [T * H * D, D, H * D, 1]


def arguments(graph, static, scales):
    """The adapter's options as the node takes them: dropout has one scale forward, and its inverse too backward."""
    cudnn, found = graph.library.cudnn, dict(static)
    for name in "seq_len_q", "seq_len_kv":
        n = found.get(name)
        found[name] = None if n is None else graph.tensor(np.reshape(n, (-1, 1, 1, 1)).astype(np.int32))
    if "diagonal_alignment" in found:
        found["diagonal_alignment"] = getattr(cudnn.diagonal_alignment, found["diagonal_alignment"].upper())
    if found.get("dropout") is not None:
        mask, scale = found["dropout"]
        numbers = [np.full((1, 1, 1, 1), x) for x in (scale, 1 / scale)[:scales]]
        found["dropout"] = graph.tensor(np.asarray(mask, float)), *(graph.tensor(x, "FLOAT") for x in numbers)
    return found


def forward(library, inputs, static, more=lambda graph: {}, wants_gradient=False):
    """graph, the tensors of q, k, v, bias and sink_token, o and stats; `more` gives arguments with tensors of it"""
    graph = Graph(library)
    names = None, None, None, None, "FLOAT"
    tensors = [graph.tensor(a, name, wants_gradient) for a, name in zip(inputs, names, strict=True)]
    q, k, v, bias, sink = tensors
    options = library.forward | arguments(graph, static, 1) | more(graph)
    o, lse = graph.graph.sdpa(q=q, k=k, v=v, bias=bias, sink_token=sink, generate_stats=True, **options)
    rows = inputs[0].shape[:3]
    return graph, tensors, graph.output(o, (*rows, inputs[2].shape[3])), graph.output(lse, (*rows, 1), "FLOAT")


def backward(library, inputs, o, do, lse, static, more=lambda graph: {}):
    """graph, and the tensors of dq, dk, dv, dbias and dsink_token"""
    graph = Graph(library)
    q, k, v, bias, sink = inputs
    dbias, dsink = graph.argument(bias), graph.argument(sink, "FLOAT")
    found = graph.graph.sdpa_backward(
        q=graph.tensor(q),
        k=graph.tensor(k),
        v=graph.tensor(v),
        o=graph.tensor(o),
        dO=graph.tensor(do),
        stats=graph.tensor(lse, "FLOAT"),
        bias=graph.tensor(bias),
        dBias=dbias,
        sink_token=graph.tensor(sink, "FLOAT"),
        dSink_token=dsink,
        **(arguments(graph, static, 2) | more(graph)),
    )
    return graph, [*(graph.output(t, a.shape) for t, a in zip(found, inputs[:3], strict=True)), dbias, dsink]
