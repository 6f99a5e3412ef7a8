"""Nodes of an ONNX graph, and the tensors that it holds or that its caller binds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

UNBOUND_LOCATION = "unbound.data"


def unbound_bytes(model: ModelProto) -> int:
    """Size that the (never read) file of undelivered weights must have for ONNX Runtime to accept the graph."""
    ends = [0]
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == UNBOUND_LOCATION:
            ends.append(int(entries["offset"]) + int(entries["length"]))
    return max(ends)


class GraphNodes:
    """What a graph is made of, in the order in which it is added. Names of tensors are those of the weights."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray] | None,
        shapes: Mapping[str, tuple[int, ...]],
        compute: tuple[int, np.dtype],
        weights_type: int | None,
    ):
        """tensors: the weights; None declares them by their `shapes`, as external data at `UNBOUND_LOCATION`. compute:
        ONNX element type and numpy dtype of what flows between nodes. weights_type: element type of declared weights,
        where that is another."""
        self.tensors, self.shapes = tensors, shapes
        self.element_type, self.dtype = compute
        self.weights_type = self.element_type if weights_type is None or tensors is not None else weights_type
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._declared_bytes = 0
        self._casts: set[str] = set()

    def _node(self, op: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _constant(self, name: str, array: np.ndarray) -> str:
        element_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.initializers[name] = helper.make_tensor(name, element_type, array.shape, array.tobytes(), raw=True)
        return name

    def _stored(self, name: str) -> str:
        """A weight as it is kept."""
        if name in self.initializers:
            return name
        if self.tensors is not None:
            return self._constant(name, np.asarray(self.tensors[name]).astype(self.dtype))
        size = helper.tensor_dtype_to_np_dtype(self.weights_type).itemsize * int(np.prod(self.shapes[name]))
        tensor = TensorProto(name=name, dims=self.shapes[name], data_type=self.weights_type)
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": UNBOUND_LOCATION, "offset": str(self._declared_bytes), "length": str(size)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        self._declared_bytes += -(-size // 4096) * 4096
        self.initializers[name] = tensor
        return name

    def _to_compute(self, name: str) -> str:
        """In the type of what flows between nodes."""
        if self.weights_type == self.element_type:
            return name
        output = f"{name}.cast"
        if output not in self._casts:
            self._casts.add(output)
            self._node("Cast", [name], output, to=self.element_type)
        return output
