"""Taking some examples out of a batch: whether it can be done, and their targets, which lie as in the outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from curvscope.extract.loaded import Loaded
from curvscope.graph.ragged import Ragged
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


def take_targets(loss: Loss, targets: Any, layouts: Layouts, examples: int, chosen: slice | Tensor) -> Any:
    """The targets of some of the examples: they lie as in the outputs, whose class axis indices do not have.

    Raises:
        ValueError: single ones are chosen, and targets lie otherwise.
    """
    layout = layouts.output
    if loss.name in ("cross_entropy", "causal_lm") and not targets.is_floating_point():
        axis = class_axis(loss.name, loss.settings, outputs_of(layouts, examples), targets)
        layout = replace(layout, axis=layout.axis - (axis < layout.axis))
    size = layout.outer * examples * layout.inner

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if isinstance(chosen, Tensor) and (leaf.ndim <= layout.axis or leaf.shape[layout.axis] != size):
            raise ValueError("targets that do not lie as the outputs do")
        return layout.pick(leaf, chosen)

    return pytree.tree_map(taken, targets)


def weighs_examples(loss: Loss, layouts: Layouts) -> bool:
    """Whether weights of the loss are those of single examples."""
    settings, outputs = loss.settings, layouts.outputs
    weights = [settings.get(key) for key in ("weight", "pos_weight") if loss.name == "bce_with_logits"]
    return any(w is not None and w.ndim == outputs.ndim and w.shape[layouts.output.axis] > 1 for w in weights)


def outputs_of(layouts: Layouts, examples: int) -> Tensor:
    """A stand-in for the outputs of that many examples: their shape, dtype and device, and no memory."""
    if isinstance(layouts.output, Ragged):
        return layouts.outputs
    shape = list(layouts.outputs.shape)
    shape[layouts.output.axis] = layouts.output.outer * examples * layouts.output.inner
    return layouts.outputs.new_zeros(()).expand(shape)
