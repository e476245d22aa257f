"""Taking some examples out of a batch: whether it can be done, and their targets, which lie as in the outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from curvscope.extract.loaded import Loaded
from curvscope.graph.verify import Layouts
from curvscope.load.class_axis import class_axis
from curvscope.load.problem import Loss


def can_split(loss: Loss, loaded: Loaded, layouts: Layouts) -> bool:
    """Whether targets follow the outputs example by example, so that some can be taken."""
    if loss.name != "callable":
        return not weighs_examples(loss, layouts)
    size = layouts.output.inner * loaded.examples
    leaves = [leaf for leaf in pytree.tree_leaves(loaded.targets) if isinstance(leaf, Tensor)]
    plain = layouts.output.axis == 0 and layouts.output.outer == 1
    return plain and all(leaf.ndim > 0 and leaf.shape[0] == size for leaf in leaves)


def take_targets(loss: Loss, loaded: Loaded, layouts: Layouts, low: int, high: int) -> Any:
    """The targets of some examples: they lie as in the outputs, whose class axis indices do not have."""
    layout, targets = layouts.output, loaded.targets
    if loss.name in ("cross_entropy", "causal_lm") and not targets.is_floating_point():
        axis = class_axis(loss.name, loss.settings, outputs_of(layouts, loaded.examples), targets)
        layout = replace(layout, axis=layout.axis - (axis < layout.axis))
    return pytree.tree_map(lambda leaf: layout.take(leaf, low, high) if isinstance(leaf, Tensor) else leaf, targets)


def weighs_examples(loss: Loss, layouts: Layouts) -> bool:
    """Whether weights of the loss are those of single examples."""
    settings, outputs = loss.settings, layouts.outputs
    weights = [settings.get(key) for key in ("weight", "pos_weight") if loss.name == "bce_with_logits"]
    return any(w is not None and w.ndim == outputs.ndim and w.shape[layouts.output.axis] > 1 for w in weights)


def outputs_of(layouts: Layouts, examples: int) -> Tensor:
    """A stand-in for the outputs of that many examples: their shape, dtype and device, and no memory."""
    if examples == layouts.examples:
        return layouts.outputs
    shape = list(layouts.outputs.shape)
    shape[layouts.output.axis] = layouts.output.outer * examples * layouts.output.inner
    return layouts.outputs.new_zeros(()).expand(shape)
