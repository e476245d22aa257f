"""The network on halves of the data: what tells a property of the model from one of the examples drawn."""

from __future__ import annotations

from dataclasses import dataclass

from curvscope.errors import out_of_memory
from curvscope.measure.network import Network

MATCH = 1e-3
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
NOT_RUN = "the model or its loss does not run on half of the batch"


@dataclass(frozen=True)
class Half:
    """The network on some of the examples; `scale` brings its loss to that of as many examples as there are."""

    network: Network
    examples: int
    scale: float


def halves(network: Network, *, seed: int) -> list[Half] | str:
    """A random half of the examples and its complement, or in words why there are none.

    The same examples for the same seed, however the data is cut into batches. A graph with a fixed batch size takes
    each half's examples twice. A sum over examples is scaled up to all of them; whether a callable loss is one shows in
    its values on the halves.
    """
    data = network.examples
    if data.count < 4:
        return f"a batch of {data.count} can't be halved"
    parts = _networks(network, seed, twice=False)
    if parts is None:
        if data.pieces.survey.batches > 1:
            return NOT_RUN
        if data.count % 2:
            return "the graph has a fixed batch size, which is odd"
        parts = _networks(network, seed, twice=True)
    if parts is None:
        return NOT_RUN
    if not all(part.parameters for part in parts):
        return "no target of one half counts"
    scales = _scales(network, parts)
    if isinstance(scales, str):
        return scales
    return [Half(part, part.examples.count, scale) for part, scale in zip(parts, scales, strict=True)]


def _networks(network: Network, seed: int, *, twice: bool) -> list[Network] | None:
    """The networks on both halves; None where they do not run."""
    try:
        return [Network(network.graph, part) for part in network.examples.halves(seed, twice=twice)]
    except FAILURES as error:
        if out_of_memory(error):
            raise
        return None


def _scales(network: Network, parts: list[Network]) -> list[float] | str:
    """What brings the halves' losses to the scale of the whole."""
    data, same = network.examples, [1.0, 1.0]
    if parts[0].examples.twice:
        return same
    added = [data.count / part.examples.count for part in parts]
    if data.loss.name != "callable" or not data.alone:
        return same if data.pieces.survey.total > 0 else added
    first, second = (part.value for part in parts)
    room = MATCH * abs(network.value)
    if min(first, second) - room <= network.value <= max(first, second) + room:
        return same
    if abs(first + second - network.value) <= room:
        return added
    return "the loss on the halves is neither a mean nor a sum over examples"
