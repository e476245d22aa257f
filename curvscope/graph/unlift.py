"""From an exported program to a graph module that owns its parameters, on another device or in another dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from curvscope.graph.widening import widened

aten = torch.ops.aten

# Shape and metadata checks that would pin the traced batch size, dtype or device.
CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")


def unlift(
    program: torch.export.ExportedProgram, device: torch.device, dtype: torch.dtype
) -> tuple[fx.GraphModule, dict[str, Tensor], dict[str, bool]]:
    """The program's graph with its parameters, buffers and constants as attributes and only the output returned."""
    graph = fx.Graph()
    signature = program.graph_signature
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    state: dict[str, Any] = {**program.state_dict, **program.constants}
    root = nn.Module()
    attributes: dict[str, str] = {}
    parameters: dict[str, Tensor] = {}
    requires_grad: dict[str, bool] = {}
    copied: dict[fx.Node, fx.Node] = {}
    canonical = _one_name_each(program)
    for node in program.graph.nodes:
        spec = kinds.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            if spec.target is None:
                continue
            target = canonical.get(spec.target, spec.target)
            attribute = attributes.get(target)
            if attribute is None:
                value = state[target]
                if isinstance(value, Tensor):
                    trained = spec.kind is InputKind.PARAMETER
                    tensor = value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None)
                    # get_attr targets with dots need submodules: one flat name each instead
                    attribute = target if trained else f"curvscope_state_{len(attributes)}"
                    if trained:
                        parameters[target] = tensor
                        requires_grad[target] = value.requires_grad
                    _attach(root, attribute, tensor)
                else:
                    attribute = f"curvscope_state_{len(attributes)}"
                    setattr(root, attribute, value)
                attributes[target] = attribute
            new = graph.create_node("get_attr", attribute, name=node.name)
            new.meta = dict(node.meta)
            copied[node] = new
        elif node.op == "get_attr":
            setattr(root, str(node.target), getattr(program.graph_module, str(node.target)))
            copied[node] = graph.node_copy(node, lambda n: copied[n])
        elif node.op == "output":
            names = [spec.arg.name for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
            by_name = {n.name: n for n in program.graph.nodes}
            graph.output(copied[by_name[names[0]]])
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    ordered = {}
    for name, value in program.state_dict.items():
        # Parameters that no operation reads have to be accounted for, too; second names of tied ones have not.
        if isinstance(value, nn.Parameter) and canonical[name] == name:
            ordered[name] = parameters.get(name, value.detach())
            requires_grad[name] = value.requires_grad
    module = fx.GraphModule(root, graph)
    return module, ordered, requires_grad


def _one_name_each(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Parameter name -> the first name of the same tensor: tied parameters have several."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    names = {}
    for name, value in program.state_dict.items():
        if isinstance(value, nn.Parameter):
            names[name] = first.setdefault(_storage(value), name)
    return names


def _storage(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """What two names of one tensor share."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _attach(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Hang a tensor at a dotted path under root."""
    *parents, last = path.split(".")
    owner = root
    for parent in parents:
        if not hasattr(owner, parent):
            owner.add_module(parent, nn.Module())
        owner = getattr(owner, parent)
    owner.register_buffer(last, tensor, persistent=False)


def tidy(graph: fx.Graph, device: torch.device, dtype: torch.dtype) -> None:
    """Drop checks, move baked-in devices and too narrow dtypes (casts to these go), and make every view a reshape.

    Look-ups lose what torch.nn does to their gradients alone: division by the tokens' counts, and sparse tensors.
    """

    def retarget(item: Any) -> Any:
        return device if isinstance(item, torch.device) else widened(item, dtype)

    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if str(node.target).removeprefix("aten.").split(".")[0] in CHECKS:
            graph.erase_node(node)
            continue
        if node.target is aten.embedding.default:
            node.args, node.kwargs = node.args[:3], {k: v for k, v in node.kwargs.items() if k == "padding_idx"}
        elif node.target is aten.embedding_bag.padding_idx:
            args: list[Any] = list(node.args)
            args[3:4], args[5:6] = [False] * len(args[3:4]), [False] * len(args[5:6])
            node.args = tuple(args)
        if node.target is aten.view.default:
            # A site's output may have other strides than the traced operation's had.
            node.target = aten.reshape.default
        node.args = pytree.tree_map(retarget, tuple(node.args), is_leaf=lambda x: isinstance(x, fx.Node))
        node.kwargs = pytree.tree_map(retarget, dict(node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
        if _casts_nothing(node, dtype):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _casts_nothing(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the node casts what has `dtype` already: a weight behind such a cast is the weight itself."""
    if node.target is not aten._to_copy.default or node.kwargs != {"dtype": dtype}:
        return False
    source = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    return isinstance(source, Tensor) and widened(source.dtype, dtype) is dtype
