"""Reading a torch.export archive that nobody vouches for.

torch.export.load unpickles whatever an archive marks as pickled, resolves operator names by attribute lookup,
evaluates symbolic expressions and guards as Python, imports modules named in tree specs, and puts names into
generated source. `vetted_archive` reads the archive itself, refuses all of that, and writes a new one of
nothing but what it has checked: torch never reads the original bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvscope.load.archive import (
    CONSTANTS,
    IGNORED_MEMBERS,
    MODEL,
    PLAIN_MEMBERS,
    SAMPLE_INPUTS,
    WEIGHTS,
    Archive,
    RefusedArchiveError,
    UnreadableArchiveError,
    extent_of,
    member_sizes,
    read_archive,
    write_archive,
)
from curvscope.load.expression import SYMBOL, is_arithmetic

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WEIGHT_NAME = re.compile(r"[^\x00-\x1f\"'\\(){}\[\];#%`\x7f]+")
ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
FILE_OPERATORS = {"from_file", "save"}
SCALAR_OPERATORS = frozenset(
    [f"_operator.{name}" for name in (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le",
        "gt", "ge", "and_", "or_", "lshift", "rshift", "getitem",
    )]
    + [f"torch.sym_{name}" for name in ("int", "float", "not", "ite", "max", "min", "sqrt", "sum")]
    + ["torch._sym_sqrt", "math.trunc", "math.ceil", "math.floor"]
)  # fmt: skip
# these two do nothing but call a subgraph that is in the same file, and vetted like the rest
SUBGRAPH_OPERATORS = {
    "torch.ops.higher_order.wrap_with_set_grad_enabled",
    "torch.ops.higher_order.wrap_with_autocast",
}
TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
FORBIDDEN_KEYS = {
    "constant_input",
    "as_operator",
    "as_custom_obj",
    "custom_obj",
    "token",
    "as_string_to_argument",
}
NAME_KEYS = {"as_name", "user_input_name"}
WEIGHT_KEYS = {"parameter_name", "buffer_name", "tensor_constant_name"}


def vetted_archive(data: bytes, *, surplus: bool = False) -> bytes:
    """A copy of the archive that holds nothing but its graph, its weights and its constants, each checked.

    Args:
        data: the archive.
        surplus: cut off bytes that belong to no weight (the rest of a storage that a weight is a view of).

    Raises:
        RefusedArchiveError: a pickled payload, an operator outside torch.ops.aten and plain arithmetic, an
            expression that is more than arithmetic on symbols, a tree spec of other than plain containers, or
            a name that is none.
        UnreadableArchiveError: the archive is damaged or of an unknown form, or has surplus bytes.
    """
    try:
        return _vetted(data, surplus)
    except RecursionError as cause:
        raise UnreadableArchiveError("it is nested too deeply") from cause
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as cause:
        raise UnreadableArchiveError(f"it has an unknown form ({type(cause).__name__}: {cause})") from cause


def _vetted(data: bytes, surplus: bool) -> bytes:
    archive = read_archive(data)
    weights, constants = _payloads(archive, WEIGHTS, "weight_"), _payloads(archive, CONSTANTS, "tensor_")
    kept = dict(PLAIN_MEMBERS)
    for folder, config in (("data/weights/", weights), ("data/constants/", constants)):
        for path, size in member_sizes(archive, folder, config).items():
            kept[path] = archive.members[path][: size if surplus else None]
            if len(kept[path]) > size:
                raise UnreadableArchiveError(f"{path} has {len(kept[path])} bytes, where its tensors take {size}")
    _refuse_other_members(archive, kept)
    kept[MODEL] = _dump(_vetted_program(archive.json(MODEL)))
    kept[WEIGHTS], kept[CONSTANTS] = _dump(weights), _dump(constants)
    kept[SAMPLE_INPUTS] = b""
    return write_archive(kept)


def raw_weights(data: bytes) -> dict[str, Tensor]:
    """The weights as a state_dict, from the archive's raw members; the graph is not looked at.

    Raises:
        RefusedArchiveError: a weight is stored as a pickle.
        UnreadableArchiveError: a member is missing, short, or of a dtype unknown here.
    """
    archive = read_archive(data)
    found: dict[str, Tensor] = {}
    try:
        config = _payloads(archive, WEIGHTS, "weight_")
        taken = member_sizes(archive, "data/weights/", config)
    except RecursionError as cause:
        raise UnreadableArchiveError("it is nested too deeply") from cause
    for name, entry in config["config"].items():
        path = "data/weights/" + entry["path_name"]
        extent = extent_of(name, entry)
        try:
            if taken[path] == 0:
                found[name] = torch.zeros(extent.sizes, dtype=extent.dtype)
                continue
            flat = torch.frombuffer(bytearray(archive.members[path]), dtype=extent.dtype)
            found[name] = flat.as_strided(extent.sizes, extent.strides, extent.offset).clone()
        except (KeyError, TypeError, ValueError, RuntimeError) as cause:
            raise UnreadableArchiveError(f"the weight {name} can't be read ({cause})") from cause
    return found


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _payloads(archive: Archive, config_name: str, prefix: str) -> dict[str, Any]:
    if config_name not in archive.members and f"{config_name.rpartition('/')[0]}/model.pt" in archive.members:
        raise RefusedArchiveError("its weights or constants are stored as a pickle")
    config = archive.json(config_name)
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise UnreadableArchiveError(f"{config_name} has an unknown form")
    for name, entry in config["config"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("path_name"), str):
            raise UnreadableArchiveError(f"{config_name} has an unknown form")
        if entry.get("use_pickle") is not False or not entry["path_name"].startswith(prefix):
            raise RefusedArchiveError(f"{name} ({entry['path_name']}) is stored as a pickle")
        if IDENTIFIER.fullmatch(entry["path_name"]) is None:
            raise RefusedArchiveError(f"{entry['path_name']!r} is no member name")
        _check_weight_name(name)
        _walk(entry.get("tensor_meta"), name)
    return config


def _refuse_other_members(archive: Archive, kept: Mapping[str, bytes]) -> None:
    known = set(kept) | IGNORED_MEMBERS | {MODEL, WEIGHTS, CONSTANTS, SAMPLE_INPUTS}
    for name, content in archive.members.items():
        if name == SAMPLE_INPUTS and content:
            raise RefusedArchiveError("it holds sample inputs, stored as a pickle")
        if name not in known:
            raise RefusedArchiveError(f"it holds {name!r}, which is neither graph nor weight")
    for name in ("archive_format", "archive_version", "byteorder"):
        if archive.members.get(name, PLAIN_MEMBERS[name]).strip() != PLAIN_MEMBERS[name]:
            raise UnreadableArchiveError(f"its {name} is {archive.members[name][:40]!r}")


def _vetted_program(program: Any) -> dict[str, Any]:
    """The program with its guards, metadata and verifiers left out, once everything else has been checked."""
    try:
        module = program["graph_module"]
        graph, signature, calls = module["graph"], module["signature"], module["module_call_graph"]
        ranges, version = program["range_constraints"], program["schema_version"]
    except (KeyError, TypeError) as cause:
        raise UnreadableArchiveError(f"{MODEL} has an unknown form") from cause
    _walk(graph, "graph")
    _walk(signature, "signature")
    _walk(ranges, "range_constraints")
    _walk(version, "schema_version")
    for symbol, bounds in ranges.items():
        _check_name(symbol, SYMBOL, "range_constraints")
        if not all(bound is None or type(bound) is int for bound in bounds.values()):
            raise RefusedArchiveError(f"the range of {symbol} is not given by integers")
    entries = [_vetted_call(entry) for entry in calls]
    return {
        "graph_module": {
            "graph": graph,
            "signature": signature,
            "module_call_graph": entries,
            "metadata": {},
            "treespec_namedtuple_fields": {},
        },
        "opset_version": {"aten": int(program.get("opset_version", {}).get("aten", 0))},
        "range_constraints": ranges,
        "schema_version": version,
        "verifiers": ["TRAINING"],
        "torch_version": "",
        "guards_code": [],
    }


def _vetted_call(entry: Any) -> dict[str, Any]:
    signature = entry.get("signature")
    if entry.get("fqn"):
        _check_weight_name(entry["fqn"])
    if signature is not None:
        _walk(signature, "module_call_graph")
        for name in ("in_spec", "out_spec"):
            _check_tree(signature[name])
        for name in signature.get("forward_arg_names") or ():
            _check_name(name, IDENTIFIER, "forward_arg_names")
    return {"fqn": entry.get("fqn", ""), "signature": signature}


def _walk(value: Any, where: str) -> None:
    """Check every name, target and expression below; node metadata is dropped on the way."""
    if isinstance(value, list):
        for item in value:
            _walk(item, where)
        return
    if not isinstance(value, dict):
        return
    if "nodes" in value:
        _check_graph_inputs(value.get("inputs"))
    if "target" in value:
        _check_target(value["target"])
        value["metadata"] = {}
        where = f"node {value.get('name') or value['target']}"
    for key, item in value.items():
        if key in FORBIDDEN_KEYS:
            raise RefusedArchiveError(f"{where} uses {key}")
        if key == "expr_str":
            if not is_arithmetic(item):
                raise RefusedArchiveError(f"the expression {str(item)[:80]!r} is not plain arithmetic")
        elif key == "name":
            # a positional argument of a subgraph call has no name, nor has every node
            if item not in ("", None):
                _check_name(item, IDENTIFIER, where)
        elif key in NAME_KEYS:
            _check_name(item, IDENTIFIER, where)
        elif key in WEIGHT_KEYS:
            _check_weight_name(item)
        elif key == "custom_obj_values" and item:
            raise RefusedArchiveError(f"{where} uses custom objects")
        elif key in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
            for name, meta in item.items():
                _check_name(name, IDENTIFIER, where)
                _walk(meta, where)
        else:
            _walk(item, where)


def _check_graph_inputs(inputs: Any) -> None:
    # the value of a string input would be put into the source of a guard
    for entry in inputs if isinstance(inputs, list) else [None]:
        if not isinstance(entry, dict) or not set(entry) <= {"as_tensor", "as_sym_int"}:
            raise RefusedArchiveError("the graph takes other inputs than tensors")


def _check_target(target: Any) -> None:
    if not isinstance(target, str):
        raise RefusedArchiveError("an operator's name is no string")
    if target in SCALAR_OPERATORS or target in SUBGRAPH_OPERATORS:
        return
    match = ATEN.fullmatch(target)
    if match is None:
        raise RefusedArchiveError(f"it calls {target!r}, which is no operator of torch.ops.aten")
    packet = getattr(torch.ops.aten, match[1], None) if match[1] not in FILE_OPERATORS else None
    operator = getattr(packet, match[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    # what the dispatcher does not know are TorchScript's own functions: files, strings, threads
    if not isinstance(operator, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(operator.name()):
        raise RefusedArchiveError(f"it calls {target!r}, which is no tensor operator of this torch")


def _check_name(name: Any, pattern: re.Pattern[str], where: str) -> None:
    if not isinstance(name, str) or pattern.fullmatch(name) is None:
        raise RefusedArchiveError(f"{name!r} in {where} is no plain name")


def _check_weight_name(name: Any) -> None:
    _check_name(name, WEIGHT_NAME, "the weights")


def _check_tree(text: Any) -> None:
    try:
        protocol, tree = json.loads(text)
    except (TypeError, ValueError) as cause:
        raise RefusedArchiveError("a tree spec is no JSON") from cause
    if protocol != 1:
        raise UnreadableArchiveError(f"a tree spec has protocol {protocol!r}")
    _check_tree_node(tree)


def _check_tree_node(node: Any) -> None:
    if not isinstance(node, dict) or node.get("type") not in TREE_TYPES:
        raise RefusedArchiveError(
            f"a tree spec names the type {node.get('type') if isinstance(node, dict) else node!r}"
        )
    context = node.get("context")
    if isinstance(context, str):
        try:
            context = json.loads(context)
        except ValueError as cause:
            raise RefusedArchiveError("a tree spec's context is no JSON") from cause
    keys = context if isinstance(context, list) else [context]
    # a mapping in a context may name an enum, whose module would be imported
    if not all(key is None or isinstance(key, int) or _is_identifier(key) for key in keys):
        raise RefusedArchiveError(f"a tree spec holds {context!r}")
    for child in node.get("children_spec", []):
        _check_tree_node(child)


def _is_identifier(value: Any) -> bool:
    return isinstance(value, str) and IDENTIFIER.fullmatch(value) is not None
