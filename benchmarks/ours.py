"""curvscope's side: the factors and the gradient from its sweep, and the whole default analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers import Factors
from benchmarks.workloads import Workload
from curvscope.extract.collector import Extract
from curvscope.extract.roots import Root, make_root
from curvscope.extract.sweep import sweep
from curvscope.graph.export import export_model
from curvscope.graph.functional import build
from curvscope.graph.verify import verify
from curvscope.load.loss import named_loss
from curvscope.load.problem import Inputs
from curvscope.records import Run


class Ours:
    """One workload's graph with its layouts, made once: neither is part of what is timed."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.loss = named_loss("cross_entropy")
        exported = export_model(workload.model, Inputs((workload.inputs,)), {})
        self.graph = build(
            exported.program,
            device=workload.inputs.device,
            dtype=torch.float32,
            dynamic=exported.dynamic,
        )
        # norms and free parameters have no factors, and the peer does not treat them
        self.wanted = {name: None for name, spec in self.graph.layers.items() if not spec.exact_only}
        self.layouts = verify(self.graph, [workload.inputs], exported.example_axes, workload.examples)

    def factors_and_gradient(self) -> dict[str, Extract]:
        """Everything from the batch on: forward, the root of the loss Hessian in its outputs, backward, products."""
        return sweep(self.graph, [self.workload.inputs], self.layouts, self._root, self.wanted)

    def _root(self, outputs: Tensor) -> Root:
        workload = self.workload
        return make_root(
            self.loss,
            outputs,
            workload.targets,
            self.layouts.output,
            fisher=workload.fisher,
            samples=1,
            seed=0,
        )

    def factors(self) -> dict[str, Factors]:
        """The factors alone, in the shape in which the peer's are compared."""
        extracts = self.factors_and_gradient()
        return {
            flavour: {name: extract.factors[flavour] for name, extract in extracts.items()}
            for flavour in ("expand", "reduce")
        }

    def gradient(self) -> dict[str, Tensor]:
        """dL/dW of every layer, [d_out, d_in(+1)]."""
        found = {name: extract.gradient for name, extract in self.factors_and_gradient().items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def analyze(workload: Workload, memory: int | None = None) -> Run:
    """The whole default analysis."""
    import curvscope

    return curvscope.analyze(
        workload.model,
        (workload.inputs, workload.targets),
        loss="cross_entropy",
        memory=memory,
        device=workload.inputs.device.type,
    )
