"""Whose each row is at a site that a gate sends rows to, as to the experts of a mixture.

How many rows an expert gets, and in which order, only the values of the batch tell: no axis follows when the examples
are permuted. So the inputs and the rows that are known already are disturbed a little, those of some examples at a
time. A row that changes is one of theirs. With the examples' numbers in binary, two passes a digit name every row's
example, and a row that changes with both values of a digit belongs to several. What nothing changes (behind units that
are dead for it) gradients tell: those of the same examples' outputs. A row that neither tells adds nothing to any
block; it is taken to lie where an earlier site with the same rows has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.graph.functional import Graph
from curvscope.graph.layout import Layout
from curvscope.graph.passing import watched_pass
from curvscope.graph.ragged import Ragged

# Parts of sqrt(eps) of the largest entry that are added; less, where so much sends rows elsewhere.
STRENGTHS = (1.0, 0.1, 0.01)
# A row has changed where it differs by more than this many times eps: some devices add up in varying order.
CHANGED = 16


@dataclass(frozen=True)
class Routing:
    """What whole passes over a batch are compared with.

    Attributes:
        graph: the model.
        tensors: the batch.
        axes: the example axis of every input.
        examples: N.
        output: the layout of its output.
        known: the sites whose layouts are established.
        wanted: site -> how many leading axes of its rows (its input, an embedding's output) may hold them.
    """

    graph: Graph
    tensors: Sequence[Tensor]
    axes: Sequence[int | None]
    examples: int
    output: Layout
    known: Mapping[str, Layout]
    wanted: Mapping[str, int]

    def layouts(self) -> dict[str, Layout]:
        """The layouts of those sites all of whose rows can be told."""
        rows = self._rows(None, 0.0)
        told = next((told for strength in STRENGTHS if (told := self._disturbed(rows, strength)) is not None), None)
        if told is None:
            return {}
        if not all(bool((digits.sum(1) == 1).all()) for digits in told.values()):
            for place, reached in self._reached().items():
                still = told[place].sum(1) == 0
                told[place] = torch.where(still.unsqueeze(1), reached, told[place])
        owners = {place: _owner(digits, self.examples) for place, digits in told.items()}
        found: dict[str, Tensor] = {}
        layouts: dict[str, Layout] = {}
        for (target, axis), owner in owners.items():
            if owner is None or target in found:
                continue
            whole = [owner, *(_completed(owner, other) for other in reversed(found.values()))]
            chosen = next((each for each in whole if each is not None and bool((each >= 0).all())), None)
            if chosen is not None:
                found[target], layouts[target] = chosen, Ragged.of(axis, chosen, self.examples)
        return layouts

    def _halves(self) -> Iterator[Tensor]:
        """For every binary digit of the examples' numbers those that have 0 there, then those that have 1."""
        for digit in range((self.examples - 1).bit_length()):
            one = (torch.arange(self.examples) >> digit) % 2 == 1
            yield ~one
            yield one

    def _disturbed(self, rows: Mapping[str, Tensor], strength: float) -> dict[tuple[str, int], Tensor] | None:
        """(site, axis) -> [digits, 2, rows]: which rows change with the examples that have 0 (1) at the digit.

        None where the disturbance changed how many rows there are.
        """
        sides: dict[tuple[str, int], list[Tensor]] = {}
        for chosen in self._halves():
            disturbed = self._rows(chosen, strength)
            if any(disturbed[target].shape != rows[target].shape for target in rows):
                return None
            for target, count in self.wanted.items():
                for axis in range(count):
                    changed = _changed(disturbed[target], rows[target], axis)
                    sides.setdefault((target, axis), []).append(changed)
        return {place: torch.stack(each).unflatten(0, (-1, 2)) for place, each in sides.items()}

    def _reached(self) -> dict[tuple[str, int], Tensor]:
        """The same of the rows whose outputs get a gradient from the outputs of these examples."""
        sides: dict[tuple[str, int], list[Tensor]] = {}
        with watched_pass(self.graph, self.tensors) as (output, watched), torch.enable_grad():
            own = {target: tensor for target, tensor in watched.items() if target in self.wanted}
            if not own:
                return {}
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(6)).to(output)
            for chosen in self._halves():
                cotangent = self.output.flat(noise) * chosen.unsqueeze(1).to(noise)
                wanted = self.output.unflat(cotangent, noise)
                grads = torch.autograd.grad(
                    output, list(own.values()), wanted, retain_graph=True, materialize_grads=True
                )
                for target, gradient in zip(own, grads, strict=True):
                    for axis in range(self.wanted[target]):
                        reached = _changed(gradient, torch.zeros_like(gradient), axis)
                        sides.setdefault((target, axis), []).append(reached)
        return {place: torch.stack(each).unflatten(0, (-1, 2)) for place, each in sides.items()}

    def _rows(self, chosen: Tensor | None, strength: float) -> dict[str, Tensor]:
        """The rows of the wanted sites in a pass with these examples disturbed."""
        rows: dict[str, Tensor] = {}
        handles = []

        def keeper(target: str) -> Any:
            def keep(module: Any, args: Any, result: Tensor) -> None:
                rows[target] = (result if isinstance(module, nn.Embedding) else args[0]).detach()

            return keep

        def disturber(layout: Layout) -> Any:
            def disturb(module: Any, args: Any, result: Tensor) -> Tensor:
                return result if chosen is None else _disturbed(result, layout, chosen, strength)

            return disturb

        given = list(self.tensors)
        for position, axis in enumerate(self.axes):
            if axis is not None and chosen is not None:
                given[position] = _disturbed(given[position], Layout(axis), chosen, strength)
        try:
            for site in self.graph.sites():
                hook = keeper(site.target) if site.target in self.wanted else None
                if site.target in self.known:
                    hook = disturber(self.known[site.target])
                if hook is not None:
                    handles.append(site.module.register_forward_hook(hook))
            with torch.no_grad():
                self.graph.run(*given)
        finally:
            for handle in handles:
                handle.remove()
        return rows


def _owner(digits: Tensor, examples: int) -> Tensor | None:
    """The example of every row, -1 where nothing tells; None where rows belong to several."""
    clear = (digits.sum(1) == 1).all(0)
    untold = (digits.sum(1) == 0).all(0)
    places = 2 ** torch.arange(len(digits), device=digits.device).unsqueeze(1)
    owner = (digits[:, 1] * places).sum(0)
    return torch.where(untold, -1, owner) if bool(((clear & (owner < examples)) | untold).all()) else None


def _completed(owner: Tensor, other: Tensor) -> Tensor | None:
    """The examples of another site's rows, if there are as many and those that are told here are the same."""
    told = owner >= 0
    return other if len(owner) == len(other) and bool((owner == other)[told].all()) else None


def _disturbed(tensor: Tensor, layout: Layout, chosen: Tensor, strength: float) -> Tensor:
    """The tensor with noise in the rows of these examples; indices stay as they are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)).to(tensor)
    marks = torch.zeros_like(layout.flat(tensor))
    marks[chosen.to(tensor.device)] = 1
    size = strength * float(torch.finfo(tensor.dtype).eps) ** 0.5 * float(tensor.abs().max())
    return tensor + size * noise * layout.unflat(marks, tensor)


def _changed(disturbed: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Which of the rows along an axis differ by more than rounding."""
    if not rows.numel():
        return torch.zeros(rows.shape[axis], dtype=torch.bool, device=rows.device)
    others = tuple(other for other in range(rows.ndim) if other != axis)
    gap = (disturbed - rows).abs()
    gap = gap.amax(others) if others else gap
    size = max(float(rows.abs().max()), float(disturbed.abs().max()))
    return gap > CHANGED * float(torch.finfo(rows.dtype).eps) * size
