"""From a module to a program: its operators on tensors, recorded for a batch of any size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowtrain.export.decompositions import TABLE

aten = torch.ops.aten


def trace(program: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """``program(*inputs.values())`` recorded by torch.export, with the first axis of every input of any size.

    Gradients that the program takes become operators of it. What depends on weights alone is computed here, once.
    """
    sizes = {size for value in inputs.values() for size in value.shape[1:]}
    rows = next(number for number in count(13) if number not in sizes)  # equal sizes would be taken for the same one
    inputs = {name: value[:rows] for name, value in inputs.items()}
    batch = {0: Dim("batch")}
    with sdpa_kernel(SDPBackend.MATH):  # of operators that every program has, the gradient's too
        graph = make_fx(program, TABLE, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs.values())
    fold(graph)
    named = _with_names(graph, list(inputs))
    shapes = {name: batch for name in inputs}
    return torch.export.export(named, (), inputs, dynamic_shapes=shapes, strict=False)


def fold(graph: GraphModule) -> None:
    """Replace what follows from constants alone by its value, in place."""
    known: dict[Node, object] = {}
    for node in [*graph.graph.nodes]:
        if node.op == "get_attr":
            value = attrgetter(node.target)(graph)
            if isinstance(value, Tensor):
                known[node] = value.detach()
        elif node.op == "call_function":
            _multiply_by_inverse(node, known, graph)
            if _is_function(node.target) and all(source in known for source in node.all_input_nodes):
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if isinstance(value, Tensor) and node.op != "get_attr" and not all(user in known for user in node.users):
            node.replace_all_uses_with(_constant(node, value, graph))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_function(target: Callable) -> bool:
    """Whether ``target`` returns the same for the same arguments, and does nothing else."""
    if not isinstance(target, torch._ops.OpOverload):
        return target.__module__ == "_operator"
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _constant(before: Node, value: Tensor, graph: GraphModule) -> Node:
    name = f"constant_{before.name}"
    graph.register_buffer(name, value.clone())
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def _multiply_by_inverse(node: Node, known: dict, graph: GraphModule) -> None:
    """Let a product with an inverse stand for the solution of triangular equations with a constant matrix."""
    if node.target is not aten.linalg_solve_triangular.default or node.args[0] not in known or node.args[1] in known:
        return
    matrix = known[node.args[0]]
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    inverse = _constant(node, node.target(matrix, eye, **node.kwargs), graph)
    known[inverse] = attrgetter(inverse.target)(graph)
    node.target, node.args, node.kwargs = aten.mm.default, (inverse, node.args[1]), {}


def _with_names(graph: GraphModule, names: list[str]) -> GraphModule:
    """``graph`` with ``names`` for its inputs, which are its first nodes."""
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = node._name = name
    graph.recompile()
    return graph
