"""The least time the factors can take: forward, the backward passes they need, and their products.

    floor = t(forward + K activation-only backward passes) + (flops of the symmetric products) / rate

K counts the columns of the loss Hessian's root. `floor+gradient` adds one more pass, which the gradient needs where it
is no combination of the columns (mc); where it is one (exact), the columns' passes could serve it, too. The passes
are timed as the cheapest of several ways of running them. A product `X^T X` with X [k, n] counts n^2 k flops, half
of a full product's, because its result is symmetric; the rate is what a large square product reaches in the same
process. Not in the floor, though any tool has to spend them: the products of the gradient itself, the reading of
patches (unfold) and the sums over positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import best_seconds, seconds_of
from benchmarks.workloads import Workload

BYTES_PER_NUMBER = 4


@dataclass(frozen=True)
class LayerCost:
    """One layer's products: `rows` are those of one pass (examples times positions)."""

    name: str
    d_in: int
    d_out: int
    examples: int
    rows: int
    columns: int

    @property
    def a_expand(self) -> int:
        return self.d_in**2 * self.rows

    @property
    def b_expand(self) -> int:
        return self.d_out**2 * self.rows * self.columns

    @property
    def a_reduce(self) -> int:
        return self.d_in**2 * self.examples

    @property
    def b_reduce(self) -> int:
        return self.d_out**2 * self.examples * self.columns

    @property
    def products(self) -> int:
        return self.a_expand + self.b_expand + self.a_reduce + self.b_reduce

    @property
    def gradient(self) -> int:
        return 2 * self.rows * self.d_in * self.d_out

    @property
    def row_bytes(self) -> int:
        """What the products of `expand` have to read: patches once, output gradients once a column."""
        return BYTES_PER_NUMBER * self.rows * (self.d_in + self.columns * self.d_out)


@dataclass(frozen=True)
class Cost:
    """Flops of one workload; `backward` is one activation-only pass."""

    forward: int
    backward: int
    passes: int
    layers: tuple[LayerCost, ...]

    @property
    def products(self) -> int:
        return sum(layer.products for layer in self.layers)

    @property
    def gradient(self) -> int:
        return sum(layer.gradient for layer in self.layers)

    def as_dict(self) -> dict[str, float]:
        """Giga-flops by part, and the megabytes of rows that the products read."""
        totals = {
            "forward": self.forward,
            "backward": self.backward * self.passes,
            "a_expand": sum(layer.a_expand for layer in self.layers),
            "b_expand": sum(layer.b_expand for layer in self.layers),
            "a_reduce": sum(layer.a_reduce for layer in self.layers),
            "b_reduce": sum(layer.b_reduce for layer in self.layers),
            "gradient": self.gradient,
        }
        giga = {name: flops / 1e9 for name, flops in totals.items()}
        return giga | {"row_megabytes": sum(layer.row_bytes for layer in self.layers) / 1e6}


@contextmanager
def activation_only(workload: Workload) -> Iterator[list[Tensor]]:
    """Freezes every parameter and yields the list of leaves, filled by each forward pass.

    The leaves are the outputs of the layers that nothing before them makes differentiable: no pass goes further
    back than it must. Modes and flags are put back on leaving.
    """
    leaves: list[Tensor] = []
    flags = {parameter: parameter.requires_grad for parameter in workload.model.parameters()}

    def start_graph(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            leaves.append(output.requires_grad_())

    handles = [module.register_forward_hook(start_graph) for module in workload.layers().values()]
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def count(workload: Workload) -> Cost:
    """The flops of every part, from one forward and one backward pass."""
    shapes: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            channels = 1 if isinstance(module, nn.Conv2d) else -1
            shapes[name] = output.numel() // output.shape[channels]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in workload.layers().items()]
    # The flop counter has no formula for the CPU's fused attention; the plain one is the same arithmetic.
    plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    try:
        with activation_only(workload) as leaves, plain_attention:
            with FlopCounterMode(display=False) as forward:
                output = workload.model(workload.inputs)
            with FlopCounterMode(display=False) as backward:
                torch.autograd.grad(output, leaves, torch.ones_like(output))
    finally:
        for handle in handles:
            handle.remove()
    layers = tuple(
        LayerCost(
            name=name,
            d_in=module.weight[0].numel() + (module.bias is not None),
            d_out=module.weight.shape[0],
            examples=workload.examples,
            rows=shapes[name],
            columns=workload.columns,
        )
        for name, module in workload.layers().items()
    )
    return Cost(forward.get_total_flops(), backward.get_total_flops(), workload.columns, layers)


class Floor:
    """Times the floor of one workload; made once, `seconds` is called once a round.

    Attributes:
        cost: the counted flops.
        strategy: the cheapest way found to run the backward passes.
        candidates: seconds of each way that was tried.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.cost = count(workload)
        with torch.no_grad():
            output = workload.model(workload.inputs)
        self._seeds = torch.randn(self.cost.passes, *output.shape, dtype=output.dtype, device=output.device)
        ways: dict[str, Callable[[list[Tensor]], None]] = {
            "loop": self._loop,
            "batched gradients": self._batched,
            "repeated examples": self._repeated,
        }
        with activation_only(workload) as leaves:
            self.candidates = {name: best_seconds(partial(way, leaves), 3) for name, way in ways.items()}
        self.strategy = min(self.candidates, key=lambda name: self.candidates[name])
        self._way = ways[self.strategy]

    def _forward(self, leaves: list[Tensor], copies: int = 1) -> Tensor:
        leaves.clear()
        inputs = self.workload.inputs
        return self.workload.model(inputs if copies == 1 else inputs.repeat(copies, *[1] * (inputs.ndim - 1)))

    def _loop(self, leaves: list[Tensor]) -> None:
        output = self._forward(leaves)
        last = self.cost.passes - 1
        for k, seed in enumerate(self._seeds):
            torch.autograd.grad(output, leaves, seed, retain_graph=k < last)

    def _batched(self, leaves: list[Tensor]) -> None:
        torch.autograd.grad(self._forward(leaves), leaves, self._seeds, is_grads_batched=True)

    def _repeated(self, leaves: list[Tensor]) -> None:
        output = self._forward(leaves, copies=self.cost.passes)
        torch.autograd.grad(output, leaves, self._seeds.flatten(0, 1))

    def seconds(self, rate: float) -> dict[str, float]:
        """One timing: passes (forward and backward), products at that rate (flops/s), and their sums."""
        with activation_only(self.workload) as leaves:
            passes = seconds_of(lambda: self._way(leaves))
            forward = seconds_of(lambda: self._forward(leaves))
        products = self.cost.products / rate
        one_more = max(passes - forward, 0.0) / self.cost.passes
        floor = passes + products
        return {
            "forward": forward,
            "passes": passes,
            "products": products,
            "floor": floor,
            "floor+gradient": floor + one_more,
        }


def matrix_rate(device: str) -> float:
    """Flops a second of a large square float32 product on that device, at the current thread count."""
    n = 2048 if device == "cpu" else 8192
    square = torch.randn(n, n, device=device)
    return 2 * n**3 / best_seconds(lambda: square @ square, 3)
