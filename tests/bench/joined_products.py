"""For `bench_gpu --join`: products of one input with several matrices as one product with all of them side by side.

A compiler's pass over the forward graph, before its gradient is taken: the queries, keys and values of an attention,
the gate and the way up of a SwiGLU. Backward they are one product for the input and one for the matrices, and the
input's gradient is no longer added up from each. The matrices are laid side by side in every pass, which costs reading
and writing them once; with thousands of rows that is little.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch.fx import Graph, Node

_LINEAR = torch._C._nn.linear


def install() -> None:
    """From now on `torch.compile` joins; what it compiled before stays as it is."""
    import torch._inductor.config

    torch._inductor.config.pre_grad_custom_pass = join


def join(graph: Graph) -> None:
    """Join the products without bias that read one input."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        without_bias = len(node.args) < 3 or node.args[2] is None
        if node.op == "call_function" and node.target is _LINEAR and without_bias and not node.kwargs:
            readers[node.args[0]].append(node)
    for source, products in readers.items():
        if len(products) < 2:
            continue
        matrices = [product.args[1] for product in products]
        sizes = [matrix.meta["example_value"].shape[0] for matrix in matrices]
        with graph.inserting_before(products[0]):
            # All matrices are the model's, which the graph is given before anything is computed.
            joined = graph.call_function(_LINEAR, (source, graph.call_function(torch.cat, (matrices,))))
            parts = graph.call_function(torch.split, (joined, sizes, -1))
            for place, product in enumerate(products):
                part = graph.call_function(operator.getitem, (parts, place))
                product.replace_all_uses_with(part)
    graph.eliminate_dead_code()
