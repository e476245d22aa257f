"""Every kind of layer in a small body, and networks that mix tokens, for the matrix of kinds and forms of loss.

A body takes tokens x [N, T, WIDTH] and ids [N, T]. While a network runs with `calls` it tells of every linear call: its
input rows and its output, as plain arithmetic; recurrent layers are then unrolled by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EXAMPLES, TOKENS, WIDTH, CLASSES, WORDS = 3, 4, 6, 3, 5
HIDDEN = 2


@dataclass(frozen=True)
class Call:
    """One application of a weight.

    Attributes:
        weight: the parameter's name.
        rows: what goes in, [N, R, d_in] ([N, R, groups d_in] with groups).
        output: what comes out, with the function that makes [N, R, d_out] of a tensor like it.
        out, into: the rows and columns of the layer's matrix that the call reads; None for all.
        role: of a weight used in several.
    """

    weight: str
    rows: Tensor
    output: Tensor
    output_rows: Callable[[Tensor], Tensor]
    out: Sequence[int] | None = None
    into: Sequence[int] | None = None
    role: str = ""


class Body(nn.Module):
    """`calls` is a list to tell, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["calls"] = None

    def note(
        self, weight: str, rows: Tensor, output: Tensor, to_rows: Callable[[Tensor], Tensor] = lambda y: y, **more: Any
    ) -> Tensor:
        """Tells of a call, and gives its output back."""
        if self.calls is not None:
            output = output.clone()
            self.calls.append(Call(weight, rows.detach(), output, to_rows, **more))
        return output


class Plain(Body):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.note("layer.weight", x, self.layer(x))


class Twice(Body):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.note("layer.weight", x, self.layer(x)))
        return x


class Packed(Body):
    """Causal attention over slices of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 9)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        parts = []
        for i, (weight, bias) in enumerate(zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)):
            parts.append(self.note("qkv.weight", x, functional.linear(x, weight, bias), out=range(3 * i, 3 * i + 3)))
        q, k, v = parts
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill(mask, float("-inf")).softmax(-1) @ v


class Columns(Body):
    """A product with a concatenation, written as a sum: two slices of the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, 3, bias=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        w, other = self.mix.weight, torch.tanh(x.roll(1, 1))
        left = self.note("mix.weight", x, functional.linear(x, w[:, :WIDTH]), into=range(WIDTH))
        right = self.note("mix.weight", other, other @ w[:, WIDTH:].T, into=range(WIDTH, 2 * WIDTH))
        return left * right


class Einsum(Body):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, WIDTH, 2))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        heads = torch.einsum("bnd,hdk->bhnk", x, self.w)
        return self.note("w", x, heads, lambda y: y.transpose(1, 2).flatten(2))


class Heads(Body):
    """Every head has a weight of its own for its own part of the input: groups."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        heads = torch.einsum("bthd,hdk->bthk", x.unflatten(-1, (2, 3)), self.w)
        return self.note("w", x, heads, lambda y: y.flatten(2))


class Bilinear(Body):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(3, 3, 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        left, right = x[..., :3], x.flip(1)[..., 3:]
        rows = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(2)
        return self.note("form.weight", rows, self.form(left, right))


class Convolution(Body):
    """The numbers of all tokens as an image of some shape."""

    def __init__(self, conv: nn.Module, *shape: int) -> None:
        super().__init__()
        self.conv: Any = conv
        self.shape = shape

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        image = x.flatten(1).unflatten(1, self.shape)
        output = self.conv(image)
        if self.calls is None:
            return output
        return self.note("conv.weight", self._rows(image.detach()), output, lambda y: y.flatten(2).mT)

    def _rows(self, image: Tensor) -> Tensor:
        """What goes in, [N, R, groups d_in]: the derivative of a group's first output by that output's weights."""
        transposed, groups = isinstance(self.conv, nn.modules.conv._ConvTransposeNd), self.conv.groups
        weight = self.conv.weight.detach()
        J = torch.autograd.functional.jacobian(
            lambda w: torch.func.functional_call(self.conv, {"weight": w}, (image,)), weight
        )
        J = J.flatten(2, -1 - weight.ndim)  # [N, O, R, *weight]
        if transposed:  # stored [C_in, O / groups, *kernel]
            J = J.unflatten(3, (groups, -1)).transpose(4, 5).flatten(3, 4)
        first = range(0, J.shape[1], J.shape[1] // groups)
        return torch.cat([J[:, o, :, o].flatten(2) for o in first], -1)


class Lookup(Body):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.note("table.weight", functional.one_hot(ids, WORDS).to(x), self.table(ids))


class Bag(Body):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.tanh(x.sum((1, 2)))[:, None] * self.bag(ids)


class TiedTable(Body):
    """A table whose transpose is a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        looked = self.note("table.weight", functional.one_hot(ids, WORDS).to(x), self.table(ids), role="embedding")
        h = torch.tanh((x + looked).cumsum(1))
        return self.note("table.weight", h, functional.linear(h, self.table.weight), role="head")


class TiedLinear(Body):
    """W down and W^T up again."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = torch.tanh(self.note("w", x, functional.linear(x, self.w), role="linear").cumsum(1))
        return self.note("w", h, h @ self.w, role="transposed")


class Norm(Body):
    """On tokens, or on an image of the numbers of all tokens."""

    def __init__(self, norm: nn.Module, *shape: int) -> None:
        super().__init__()
        self.norm = norm
        self.shape = shape
        with torch.no_grad():
            for buffer in norm.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.norm(x.flatten(1).unflatten(1, self.shape) if self.shape else x)


class Free(Body):
    """A position table that is added, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.scale = nn.Parameter(torch.randn(TOKENS, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.tanh(x + self.places) * self.scale


class Recurrent(Body):
    """A recurrent layer, or a cell over time; told of call by call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer
        self.of_layer = isinstance(layer, nn.RNNBase)
        self.suffix = "_l0" if self.of_layer else ""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.calls is not None:
            return self._unrolled(x)
        if self.of_layer:
            return self.layer(x)[0]
        states, state = [], None
        for time in range(x.shape[1]):
            state = self.layer(x[:, time], state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, 1)

    def _unrolled(self, x: Tensor) -> Tensor:
        h, c, states = (x.new_zeros(x.shape[0], HIDDEN) for _ in range(2)), None, []
        h, c = h
        for time in range(x.shape[1]):
            into, back = self._product("ih", x[:, time]), self._product("hh", h)
            if isinstance(self.layer, (nn.LSTM, nn.LSTMCell)):
                i, f, g, o = (into + back).chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif isinstance(self.layer, (nn.GRU, nn.GRUCell)):
                (ir, iz, i_n), (hr, hz, hn) = into.chunk(3, -1), back.chunk(3, -1)
                z = torch.sigmoid(iz + hz)
                h = (1 - z) * torch.tanh(i_n + torch.sigmoid(ir + hr) * hn) + z * h
            else:
                h = torch.tanh(into + back)
            states.append(h)
        return torch.stack(states, 1)

    def _product(self, part: str, rows: Tensor) -> Tensor:
        weight, bias = (self.layer.get_parameter(f"{kind}_{part}{self.suffix}") for kind in ("weight", "bias"))
        return self.note(
            f"layer.weight_{part}{self.suffix}", rows[:, None], rows @ weight.T + bias, lambda y: y[:, None]
        )


@dataclass(frozen=True)
class Weight:
    """A weight with Kronecker factors: how the parameter is [groups d_out, d_in], its bias, groups and roles.

    `roles` maps each to whether it uses the transpose of the matrix.
    """

    bias: str = ""
    matrix: Callable[[Tensor], Tensor] = lambda w: w.flatten(1)
    groups: int = 1
    roles: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A body with its weights; `exact` are its parameters without a Kronecker form."""

    make: Callable[[], Body]
    weights: Mapping[str, Weight] = field(default_factory=dict)
    exact: Sequence[str] = ()


def module(make: Callable[[], Body], path: str, **options: Any) -> Kind:
    return Kind(make, {f"{path}.weight": Weight(f"{path}.bias", **options)})


def convolution(conv: Callable[..., nn.Module], *shape: int, **settings: Any) -> Kind:
    """From shape[0] channels to as many."""
    bias, groups, channels = settings.get("bias", True), settings.get("groups", 1), shape[0]

    def make() -> Body:
        return Convolution(conv(channels, channels, **settings), *shape)

    def stored(w: Tensor) -> Tensor:
        return w.flatten(1)

    def transposed(w: Tensor) -> Tensor:
        return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    matrix = transposed if "Transpose" in str(conv) else stored
    return Kind(make, {"conv.weight": Weight("conv.bias" if bias else "", matrix, groups)})


def recurrent(make: Callable[..., Any], *, layer: bool) -> Kind:
    suffix, options = ("_l0", {"batch_first": True}) if layer else ("", {})
    weights = {f"layer.weight_{part}{suffix}": Weight(f"layer.bias_{part}{suffix}") for part in ("ih", "hh")}
    return Kind(lambda: Recurrent(make(WIDTH, HIDDEN, **options)), weights)


def heads_first(w: Tensor) -> Tensor:
    """[heads, d_in, d_out] as [heads d_out, d_in]."""
    return w.transpose(1, 2).flatten(0, 1)


SQUARE, CUBE, LINE = (4, 2, 3), (4, 1, 2, 3), (WIDTH, TOKENS)
KINDS: dict[str, dict[str, Kind]] = {
    # causal: what comes after the last term of an example is padding
    "tokens": {
        "linear": module(Plain, "layer"),
        "called_twice": module(Twice, "layer"),
        "embedding": Kind(Lookup, {"table.weight": Weight(matrix=lambda w: w.mT)}),
        "layer_norm": Kind(lambda: Norm(nn.LayerNorm(WIDTH)), exact=("norm.weight", "norm.bias")),
        "rms_norm": Kind(lambda: Norm(nn.RMSNorm(WIDTH)), exact=("norm.weight",)),
        "added_and_scaled": Kind(Free, exact=("places", "scale")),
        "packed": module(Packed, "qkv"),
    },
    "products": {
        "columns": Kind(Columns, {"mix.weight": Weight()}),
        "einsum": Kind(Einsum, {"w": Weight(matrix=heads_first)}),
        "heads": Kind(Heads, {"w": Weight(matrix=heads_first, groups=2)}),
        "bilinear": module(Bilinear, "form"),
        "tied_table": Kind(
            TiedTable,
            {"table.weight": Weight(matrix=lambda w: w.mT, roles={"embedding": False, "head": True})},
        ),
        "tied_linear": Kind(TiedLinear, {"w": Weight(roles={"linear": False, "transposed": True})}),
        "embedding_bag": Kind(Bag, exact=("bag.weight",)),
    },
    "convolutions": {
        "conv1d": convolution(nn.Conv1d, *LINE, kernel_size=2),
        "grouped_1d": convolution(nn.Conv1d, *LINE, kernel_size=2, groups=2, padding=1, stride=2),
        "grouped_2d": convolution(nn.Conv2d, *SQUARE, kernel_size=2, groups=2),
        "grouped_3d": convolution(nn.Conv3d, *CUBE, kernel_size=(1, 2, 2), groups=2, bias=False),
        "depthwise_1d": convolution(nn.Conv1d, *LINE, kernel_size=3, groups=WIDTH, padding=1),
        "depthwise_2d": convolution(nn.Conv2d, *SQUARE, kernel_size=(2, 1), groups=4, bias=False),
        "depthwise_3d": convolution(nn.Conv3d, *CUBE, kernel_size=(1, 2, 2), groups=4),
        "batch_norm": Kind(lambda: Norm(nn.BatchNorm2d(4), *SQUARE), exact=("norm.weight", "norm.bias")),
    },
    "transposed": {
        "transposed_1d": convolution(nn.ConvTranspose1d, *LINE, kernel_size=2, stride=2, padding=1),
        "transposed_2d": convolution(nn.ConvTranspose2d, *SQUARE, kernel_size=(2, 1), stride=(1, 2)),
        "transposed_3d": convolution(nn.ConvTranspose3d, *CUBE, kernel_size=(1, 1, 2), bias=False),
        "transposed_grouped": convolution(nn.ConvTranspose2d, *SQUARE, kernel_size=2, padding=1, groups=2),
        "group_norm": Kind(lambda: Norm(nn.GroupNorm(2, 4), *SQUARE), exact=("norm.weight", "norm.bias")),
    },
    "recurrent": {
        "rnn": recurrent(nn.RNN, layer=True),
        "gru": recurrent(nn.GRU, layer=True),
        "lstm": recurrent(nn.LSTM, layer=True),
        "rnn_cell": recurrent(nn.RNNCell, layer=False),
        "gru_cell": recurrent(nn.GRUCell, layer=False),
        "lstm_cell": recurrent(nn.LSTMCell, layer=False),
    },
}


class Network(nn.Module):
    """The bodies in a row, each behind the last and around it; outputs [N, T, C] for every token."""

    def __init__(self, kinds: Mapping[str, Kind], *, causal: bool) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict({name: kind.make() for name, kind in kinds.items()})
        self.causal = causal
        x, ids = torch.zeros(1, TOKENS, WIDTH), torch.zeros(1, TOKENS, dtype=torch.long)
        for name, body in self.bodies.items():
            width = body.eval()(x, ids).flatten(2 if causal else 1).shape[-1]
            size = WIDTH if causal else TOKENS * WIDTH
            self.register_buffer(f"mix_{name}", torch.randn(width, size) / width**0.5)
        self.register_buffer("head", torch.randn(WIDTH, CLASSES))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for name, body in self.bodies.items():
            mix = self.get_buffer(f"mix_{name}")
            if self.causal:
                x = torch.tanh(x + body(x, ids).flatten(2) @ mix)
            else:
                x = torch.tanh(x + (body(x, ids).flatten(1) @ mix).unflatten(1, (TOKENS, WIDTH)))
        return x @ self.head

    def told(self, x: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, list[Call]]]:
        """The outputs, and the calls of every weight by its full name."""
        calls: dict[str, list[Call]] = {}
        for body in self.bodies.values():
            body.__dict__["calls"] = []
        try:
            output = self(x, ids)
            for name, body in self.bodies.items():
                for call in body.__dict__["calls"]:
                    calls.setdefault(f"bodies.{name}.{call.weight}", []).append(call)
        finally:
            for body in self.bodies.values():
                body.__dict__["calls"] = None
        return output, calls
