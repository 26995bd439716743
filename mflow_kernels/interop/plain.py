"""Models as plain torch, for ONNX, OpenVINO and other programs that do not have our operators."""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.launch import use_kernels


class _Method(nn.Module):
    """A method of a model as a module."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.model, self.name)(*inputs)


def plain_module(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    method: str = "forward",
    batch: tuple[int, int] | None = None,
) -> torch.fx.GraphModule:
    """Return a module of torch's operators that computes the same as a model, without gradients.

    Values that depend on weights only, such as the inverses of 1x1 convolutions, are computed once
    and become constants. `torch.onnx.export` and `torch.export` take the result.

    Args:
        model: a module on a CPU, in eval mode.
        inputs: examples of the arguments of the method: tensors (N, ...), or tuples of them. Where
            N may vary, use more than one sample.
        method: the method of the model that the module computes, such as "log_prob".
        batch: the smallest and the largest N; None if it is that of the inputs.

    Raises:
        ValueError: the model is not on a CPU or not in eval mode.
    """
    devices = sorted({t.device.type for t in model.state_dict().values()} - {"cpu"})
    if devices:
        raise ValueError(f"model: expected a model on a CPU, got one on {devices[0]}")
    if model.training:
        raise ValueError("model: expected one in eval mode, got one in training mode")
    shapes = None
    if batch is not None:
        n = torch.export.Dim("n", min=batch[0], max=batch[1])
        shapes = (torch.utils._pytree.tree_map(lambda _: {0: n}, inputs),)
    with torch.no_grad(), use_kernels("torch"):
        plain = torch.export.export(_Method(model, method), inputs, dynamic_shapes=shapes).module()
        assert isinstance(plain, torch.fx.GraphModule)
        _fold_constants(plain)
    return plain


def _fold_constants(module: torch.fx.GraphModule) -> None:
    """Replace operators whose inputs are all constants by their results."""
    values: dict[torch.fx.Node, Any] = {}
    interpreter = torch.fx.Interpreter(module)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            interpreter.env = values
            values[node] = interpreter.run_node(node)
    for i, (node, value) in enumerate(reversed(values.items())):
        if node.op == "call_function" and isinstance(value, Tensor) and node.users:
            module.register_buffer(f"constant{i}", value.detach().clone())
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(f"constant{i}"))
        if not node.users:
            module.graph.erase_node(node)
    for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):
        module.graph.erase_node(node)  # it checks the shapes of the inputs
    module.delete_all_unused_submodules()
    module.recompile()
