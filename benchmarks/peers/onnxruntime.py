"""ONNX Runtime: its fused `com.microsoft.Attention`, which projects the input by itself, and the output projection.

Forward only. Causal by `unidirectional`; it takes no window, no grouped heads and no second input.
"""

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cases import Case, Problem
from benchmarks.machine import cores
from benchmarks.peers import Call, SkipError
from funcmha import tree


def prepare(case: Case, problem: Problem, variant: str) -> Call:
    if case.kind != "self" or case.window is not None:
        raise SkipError("com.microsoft.Attention has self-attention only, and no window")
    session, feed = _session(case, problem), {"x": problem.inputs[0]}

    def forward() -> Any:
        return session.run(["y"], feed)[0]

    return Call(forward, None, lambda: {"y": forward()})


def _session(case: Case, problem: Problem) -> onnxruntime.InferenceSession:
    leaves, C = tree.flatten(problem.params), case.width
    names = ("q_proj", "k_proj", "v_proj")
    w = np.concatenate([leaves[f"{name}.w"].reshape(C, C).T for name in names], axis=1)
    b = np.concatenate([leaves[f"{name}.b"].ravel() if case.bias else np.zeros(C, w.dtype) for name in names])
    given = {"w": w, "b": b, "wo": np.ascontiguousarray(leaves["out_proj.w"].reshape(C, C).T)}
    nodes = [
        helper.make_node(
            "Attention",
            ["x", "w", "b"],
            ["o"],
            domain="com.microsoft",
            num_heads=case.H,
            unidirectional=int(case.causal),
        ),
        helper.make_node("MatMul", ["o", "wo"], ["p" if case.bias else "y"]),
    ]
    if case.bias:
        given["bo"] = leaves["out_proj.b"]
        nodes.append(helper.make_node("Add", ["p", "bo"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [case.B, case.T, C]) for name in "xy")
    initial = [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in given.items()]
    graph = helper.make_graph(nodes, "mha", [x], [y], initial)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()  # those that the process was given
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
