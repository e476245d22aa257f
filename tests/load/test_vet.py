from __future__ import annotations

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvscope.load.archive import (
    CONSTANTS,
    MODEL,
    SAMPLE_INPUTS,
    WEIGHTS,
    RefusedArchiveError,
    UnreadableArchiveError,
    read_archive,
    write_archive,
)
from curvscope.load.vet import raw_weights, vetted_archive

Members = dict[str, bytes]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).reshape(x.shape[0] * 2, 3)
        return self.head(h.reshape(x.shape[0], 6)) * self.scale + torch.tensor(1.0)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def archive(net: Net) -> bytes:
    program = torch.export.export(
        net, (torch.randn(5, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).run_decompositions({})
    program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def members(archive: bytes) -> Members:
    return dict(read_archive(archive).members)


def test_the_vetted_copy_computes_the_same(net: Net, archive: bytes) -> None:
    program = torch.export.load(io.BytesIO(vetted_archive(archive)))
    for n in (1, 2, 5, 9):
        x = torch.randn(n, 4)
        assert torch.equal(program.module(check_guards=False)(x), net(x))
    assert program.state_dict.keys() == net.state_dict().keys()


def test_the_vetted_copy_says_nothing_of_where_it_was_written(archive: bytes) -> None:
    assert __file__.encode() in archive
    assert __file__.encode() not in vetted_archive(archive)


def test_raw_weights_need_no_graph(net: Net, members: Members) -> None:
    weights = raw_weights(write_archive({**members, MODEL: b"written by another torch"}))
    assert weights.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(weights[name], tensor)
        assert weights[name].dtype == tensor.dtype


@pytest.mark.filterwarnings("ignore:No complete tensor")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_raw_weights_of_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2, dtype=dtype)
    layer.weight = nn.Parameter(torch.randn(3, 2, dtype=dtype).t())
    layer.register_buffer("none", torch.zeros(0, 3, dtype=dtype))
    program = torch.export.export(layer, (torch.randn(2, 3, dtype=dtype),))
    program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    weights = raw_weights(buffer.getvalue())
    assert all(torch.equal(weights[name], tensor) for name, tensor in layer.state_dict().items())
    assert weights["weight"].dtype == dtype


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


Attack = Callable[[Members, Any, bytes], None]


def edit(name: str, change: Callable[[Any], None]) -> Attack:
    def attack(members: Members, program: Any, payload: bytes) -> None:
        content = program if name == MODEL else json.loads(members[name])
        change(content)
        members[name] = json.dumps(content).encode()

    return attack


def graph(change: Callable[[Any], None]) -> Attack:
    return edit(MODEL, lambda program: change(program["graph_module"]["graph"]))


def member(name: str) -> Attack:
    return lambda members, program, payload: members.__setitem__(name, payload)


def pickled_weight(members: Members, program: Any, payload: bytes) -> None:
    config = json.loads(members[WEIGHTS])
    config["config"]["head.weight"].update(use_pickle=True, tensor_meta=None)
    members["data/weights/" + config["config"]["head.weight"]["path_name"]] = payload
    members[WEIGHTS] = json.dumps(config).encode()


def pickled_constant(prefix: str) -> Attack:
    def attack(members: Members, program: Any, payload: bytes) -> None:
        config = json.loads(members[CONSTANTS])
        config["config"]["scale"].update(path_name=f"{prefix}_0", use_pickle=prefix == "tensor")
        members[f"data/constants/{prefix}_0"] = payload
        members[CONSTANTS] = json.dumps(config).encode()

    return attack


def legacy(folder: str, config: str) -> Attack:
    def attack(members: Members, program: Any, payload: bytes) -> None:
        members.pop(config)
        members[f"data/{folder}/model.pt"] = payload

    return attack


def target(name: str) -> Attack:
    return graph(lambda g: g["nodes"][-1].update(target=name))


def expression(text: str) -> Attack:
    return graph(lambda g: next(iter(g["sym_int_values"].values())).update(as_expr={"expr_str": text, "hint": None}))


def in_spec(node: Any) -> Attack:
    def change(program: Any) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, node])

    return edit(MODEL, change)


def leaf(kind: Any, context: Any) -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": []}


ENUM = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
ATTACKS: dict[str, Attack] = {
    "pickled weight": pickled_weight,
    "pickled constant": pickled_constant("tensor"),
    "custom object": pickled_constant("custom_obj"),
    "opaque object": pickled_constant("opaque_obj"),
    "legacy weights": legacy("weights", WEIGHTS),
    "legacy constants": legacy("constants", CONSTANTS),
    "sample inputs": member(SAMPLE_INPUTS),
    "shared library": member("data/aotinductor/model/m.so"),
    "second model": member("models/other.json"),
    "extra file": member("extra/notes"),
    "function of torch": target("torch.hub.load"),
    "attribute chain": target("torch.ops.aten.add.Tensor.__init__"),
    "namespace": target("torch.ops.other.op.default"),
    "dunder": target("torch.ops.aten.__class__.mro"),
    "file operator": target("torch.ops.aten.from_file.default"),
    "save operator": target("torch.ops.aten.save.default"),
    "TorchScript operator": target("torch.ops.aten.warn.default"),
    "methodcaller": target("_operator.methodcaller"),
    "math": target("math.__loader__.load_module"),
    "extension": target("#unknown:op"),
    "no string": graph(lambda g: g["nodes"][-1].update(target=["torch.ops.aten.relu.default"])),
    "expression": expression("__import__('os').system('true')"),
    "operator argument": graph(lambda g: g["nodes"][-1]["inputs"][0].update(arg={"as_operator": "torch.hub.load"})),
    "custom argument": graph(
        lambda g: g["nodes"][-1]["inputs"][0].update(arg={"as_custom_obj": {"name": "a", "class_fqn": "b"}})
    ),
    "node name": graph(lambda g: g["nodes"][0].update(name="a = __import__('os'); b")),
    "input name": graph(lambda g: g["inputs"][-1]["as_tensor"].update(name="x=open('f')")),
    "value name": graph(lambda g: g["tensor_values"].update({"a b": next(iter(g["tensor_values"].values()))})),
    "string input": graph(lambda g: g["inputs"].append({"as_string": "' or open('f', 'w') or '"})),
    "constant input": edit(
        MODEL,
        lambda p: p["graph_module"]["signature"]["input_specs"].append(
            {"constant_input": {"name": "c", "value": {"as_string": "' or 1 or '"}}}
        ),
    ),
    "parameter name": edit(
        MODEL,
        lambda p: p["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
            parameter_name='a"); open("f"); ("'
        ),
    ),
    "weight name": edit(WEIGHTS, lambda c: c["config"].update({'a")(': c["config"]["head.bias"]})),
    "weight path": edit(WEIGHTS, lambda c: c["config"]["head.bias"].update(path_name="weight_0/../../x")),
    "range": edit(MODEL, lambda p: next(iter(p["range_constraints"].values())).update(max_val="open('f')")),
    "range name": edit(MODEL, lambda p: p["range_constraints"].update({"u99999999": {"min_val": 0, "max_val": 1}})),
    "tree type": in_spec(leaf("functools.partial", "null")),
    "tree enum": in_spec(leaf("builtins.dict", ENUM)),
    "tree enum in a list": in_spec(leaf("builtins.dict", f"[{ENUM}]")),
    "tree key": in_spec(leaf("builtins.dict", json.dumps(["a): open('f'"]))),
    "nested tree": in_spec({**leaf("builtins.tuple", "null"), "children_spec": [leaf("builtins.dict", ENUM)]}),
    "argument name": edit(
        MODEL,
        lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=["x=open('f')"]),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_could_run_code_is_refused(name: str, members: Members, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    crafted = dict(members)
    ATTACKS[name](crafted, json.loads(members[MODEL]), pickle.dumps(RunsCode(marker)))
    with pytest.raises(RefusedArchiveError):
        vetted_archive(write_archive(crafted))
    assert not marker.exists()


def test_guards_verifiers_and_metadata_are_left_out(members: Members, tmp_path: Path, net: Net) -> None:
    marker = tmp_path / "marker"
    program = json.loads(members[MODEL])
    program["guards_code"] = [f"open({str(marker)!r}, 'w')"]
    program["graph_module"]["metadata"] = {"custom": "x"}
    for node in program["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {"source_fn_stack": "a,torch.hub.load", "stack_trace": "x"}
    crafted = write_archive({**members, MODEL: json.dumps(program).encode()})
    x = torch.randn(5, 4)
    assert torch.equal(torch.export.load(io.BytesIO(vetted_archive(crafted))).module()(x), net(x))
    assert not marker.exists()


def test_a_member_named_twice_is_refused(archive: bytes) -> None:
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(file.namelist()[0], b"other")
    with pytest.raises(UnreadableArchiveError):
        vetted_archive(buffer.getvalue())


DAMAGE: dict[str, Callable[[Members], None]] = {
    "no model": lambda m: m.pop(MODEL),
    "no json": lambda m: m.update({MODEL: b"{"}),
    "other form": lambda m: m.update({MODEL: b"[]"}),
    "no config": lambda m: m.update({WEIGHTS: b"[]"}),
    "no weight": lambda m: m.pop("data/weights/weight_0"),
    "other version": lambda m: m.update({"archive_version": b"7"}),
    "byte order": lambda m: m.update({"byteorder": b"big"}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_archives(name: str, members: Members) -> None:
    crafted = dict(members)
    DAMAGE[name](crafted)
    with pytest.raises(UnreadableArchiveError):
        vetted_archive(write_archive(crafted))


def _meta(change: Callable[[Any], None]) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        config = json.loads(members[WEIGHTS])
        change(config["config"]["head.weight"]["tensor_meta"])
        members[WEIGHTS] = json.dumps(config).encode()

    return apply


def _weight_bytes(change: Callable[[bytes], bytes]) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        path = "data/weights/" + json.loads(members[WEIGHTS])["config"]["head.weight"]["path_name"]
        members[path] = change(members[path])

    return apply


SIZES: dict[str, tuple[Callable[[Members], None], str]] = {
    "surplus": (_weight_bytes(lambda raw: raw + bytes(4)), "76 bytes, where its tensors take 72"),
    "short": (_weight_bytes(lambda raw: raw[:8]), "takes 72 bytes"),
    "huge sizes": (_meta(lambda m: m.update(sizes=[{"as_int": 5 * 10**9}, {"as_int": 6}])), "takes"),
    "one number without end": (
        _meta(lambda m: m.update(sizes=[{"as_int": 10**12}], strides=[{"as_int": 0}])),
        "repeats a few numbers",
    ),
    "negative": (_meta(lambda m: m.update(storage_offset={"as_int": -1})), "sizes"),
    "symbolic": (_meta(lambda m: m.update(sizes=[{"as_expr": "s0"}])), "no known size"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_bytes(name: str, members: Members) -> None:
    change, words = SIZES[name]
    crafted = dict(members)
    change(crafted)
    with pytest.raises(UnreadableArchiveError, match=words):
        vetted_archive(write_archive(crafted))
    if name != "surplus":
        with pytest.raises(UnreadableArchiveError, match=words):
            raw_weights(write_archive(crafted))


def test_compressed_members_are_refused_unread(members: Members) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
        file.writestr("archive/data/weights/weight_9", bytes(10**7))
    for read in (vetted_archive, raw_weights):
        with pytest.raises(UnreadableArchiveError, match="compressed"):
            read(buffer.getvalue())


def test_members_that_claim_more_than_there_is(archive: bytes) -> None:
    """The same bytes may be listed under several names."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
        copies = 1 + len(archive) // largest.file_size
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as file:
        for number in range(copies):
            entry = copy.copy(largest)
            entry.filename = f"{largest.filename}{number}"
            file.filelist.append(entry)
            file.NameToInfo[entry.filename] = entry
        file._didModify = True
    with pytest.raises(UnreadableArchiveError, match="more bytes than it has"):
        vetted_archive(buffer.getvalue())


@pytest.mark.parametrize("where", [MODEL, WEIGHTS])
@pytest.mark.parametrize("depth", [960, 200_000])
def test_nesting_without_end(where: str, depth: int, members: Members) -> None:
    deep = b"[" * depth + b"]" * depth
    if depth < 1000:
        program = json.loads(members[MODEL])
        program["graph_module"]["graph"]["nodes"] = "DEEP"
        deep = json.dumps(program).encode().replace(b'"DEEP"', deep)
    with pytest.raises(UnreadableArchiveError):
        vetted_archive(write_archive({**members, where: deep}))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"text"])
def test_no_archive_at_all(data: bytes) -> None:
    with pytest.raises(UnreadableArchiveError):
        vetted_archive(data)


SHAPES: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)),
        (torch.randn(3, 1, 8, 8),),
    ),
    "transformer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(3, 5, 8),)),
    "parameter list": lambda: (Listed(), (torch.randn(3, 2),)),
    "no grad inside": lambda: (Blocked(), (torch.randn(3, 2),)),
}


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterDict({"a-b": nn.Parameter(torch.ones(2, 2)), "c/d e": nn.Parameter(torch.ones(2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.parts["a-b"] + self.parts["c/d e"]


class Blocked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.abs().amax(1, keepdim=True)
        return self.layer(x) / scale


@pytest.mark.parametrize("name", SHAPES)
def test_ordinary_models_pass(name: str) -> None:
    model, args = SHAPES[name]()
    model.eval()
    program = torch.export.export(model, args, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    program = program.run_decompositions({})
    program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    again = torch.export.load(io.BytesIO(vetted_archive(buffer.getvalue())))
    assert torch.equal(again.module(check_guards=False)(*args), program.module(check_guards=False)(*args))
