"""Estimates repeated hundreds of times: one forward graph and its Jacobian, then one product a draw."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.curvature.block import Block
from curvscope.extract.collector import Columns, Extract, Form
from curvscope.extract.roots import Root, make_root, outputs_an_example
from curvscope.extract.sweep import sweep
from curvscope.graph.export import example_axes_of, export_model, flatten_inputs
from curvscope.graph.functional import build
from curvscope.graph.verify import verify
from curvscope.load import check_targets, load_problem


class Repeated:
    """A model on a batch in float64: the exact columns of every layer, and draws of any root at little cost.

    A draw's gradients are its cotangent times the outputs' Jacobian at the layer, which one sweep gives.
    """

    def __init__(self, model: nn.Module, batch: Any, loss: str) -> None:
        problem = load_problem(model, batch, loss)
        flat = flatten_inputs(problem.inputs)
        axes, self.examples = example_axes_of(flat.names, flat.tensors, {})
        exported = export_model(problem.model, problem.inputs, {}, dtype=torch.float64)
        self.graph = build(exported.program, device=torch.device("cpu"), dtype=torch.float64, dynamic=exported.dynamic)
        self.tensors = [t.double() if t.is_floating_point() else t for t in flat.tensors]
        self.targets = problem.targets
        self.layouts = verify(self.graph, self.tensors, axes, self.examples)
        self.loss = check_targets(problem.loss, self.layouts.outputs, self.targets)
        self.outputs = outputs_an_example(self.layouts.outputs, self.layouts.output)
        self.forms: dict[str, Form | None] = {
            name: "dense" if spec.exact_only or spec.roles else "factored" for name, spec in self.graph.layers.items()
        }
        like = self.layouts.outputs

        def unit(k: int) -> Tensor:
            column = torch.zeros(self.examples, self.outputs, dtype=torch.float64)
            column[:, k] = 1.0
            return self.layouts.output.unflat(column, like)

        specs = self.graph.layers.values()
        self.plain = not any(spec.roles or spec.groups > 1 or spec.kind == "embedding" for spec in specs)
        jacobian = Root("exact", self.outputs, unit, torch.zeros_like(like), 0.0, self.outputs)
        self.jacobian = self.swept(jacobian)
        self.exact = self.swept(self.root("exact", 0, 1))

    def root(self, fisher: str, seed: int, samples: int) -> Root:
        """The loss's root at the outputs."""
        outputs, layout = self.layouts.outputs, self.layouts.output
        return make_root(self.loss, outputs, self.targets, layout, fisher=fisher, samples=samples, seed=seed)

    def swept(self, root: Root) -> dict[str, Extract]:
        """The sweep itself."""
        draws = root.fisher in ("probe", "mc")
        return sweep(self.graph, self.tensors, self.layouts, root, self.forms, per_draw=self.forms if draws else ())

    def drawn(self, fisher: str, seed: int, samples: int) -> dict[str, Extract]:
        """What a sweep over the draws of one seed extracts: from the Jacobian, or that sweep for unusual layers."""
        root = self.root(fisher, seed, samples)
        if not self.plain:
            return self.swept(root)
        drawn = torch.stack([self.layouts.output.flat(root.column(k)) for k in range(samples)])  # [K, N, D]
        found = {}
        for name, known in self.jacobian.items():
            columns = known.columns
            assert isinstance(columns, Columns)
            if columns.values is not None:
                values = torch.einsum("knd,dnoi->knoi", drawn, columns.values)
                dense = dataclasses.replace(columns, count=samples, values=values)
                found[name] = dataclasses.replace(known, columns=dense, draw_moments=root.draw_moments)
                continue
            assert columns.gradients is not None
            g = torch.einsum("knd,dnro->knro", drawn, columns.gradients)
            totals = g.sum(2)
            B = {
                "expand": torch.einsum("knro,knrp->kop", g, g),
                "reduce": torch.einsum("kno,knp->kop", totals, totals),
            }
            found[name] = dataclasses.replace(
                known,
                columns=dataclasses.replace(columns, count=samples, gradients=g),
                factors={flavour: (A, B[flavour].sum(0)) for flavour, (A, _) in known.factors.items()},
                probe_B=B,
                draw_moments=root.draw_moments,
            )
        return found


def block_of(extract: Extract) -> Block:
    """The block of a layer without groups."""
    assert isinstance(extract.columns, Columns)
    spec = extract.spec
    return Block(extract.columns, spec.d_out, spec.d_in + (spec.bias is not None))
