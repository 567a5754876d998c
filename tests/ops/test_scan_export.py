"""The scan in exported models."""

import pytest
import torch
from test_selective_scan import FLOAT32_TOLERANCE, NAMES, assert_close, problem

from pamm.ops.selective_scan import choose, selective_scan


class Scan(torch.nn.Module):
    """A module that holds its orders and leaves the engine to choose itself."""

    def __init__(self, orders):
        super().__init__()
        self.register_buffer("orders", orders)

    def forward(self, x, delta, A, B, C, D, delta_bias):
        return selective_scan(x, delta, A, B, C, D, self.orders, delta_bias=delta_bias)


def exported(size, per_order, strict):
    inputs, orders = problem(1, 2, 3, size, 5, 4, per_order=per_order)
    tensors = tuple(inputs[name].detach() for name in NAMES)
    program = torch.export.export(Scan(orders), tensors, strict=strict)
    expected = selective_scan(**inputs, orders=orders, engine="reference").detach()
    assert_close({"y": program.module()(*tensors)}, {"y": expected}, FLOAT32_TOLERANCE)
    return [node for m in program.graph_module.modules() if hasattr(m, "graph") for node in m.graph.nodes]


@pytest.mark.parametrize(("per_order", "strict"), [(False, False), (True, True)], ids=["shared", "per-order-strict"])
def test_exported_graph_gives_the_reference_and_does_not_grow_with_the_sequence(per_order, strict):
    short, long = (exported(size, per_order, strict) for size in ((3, 5), (20, 21)))
    assert len(short) == len(long) < 200
    assert not any("pamm" in str(node.target) for node in long)


def test_export_form_is_chosen_only_while_exporting():
    assert choose("cpu", torch.float32) != "chunked"
