"""Our BackPACK extension: hands a site's input and output gradient to whoever collects them.

It is a first-order extension, so a backward pass with respect to activations alone drives it: no gradient of a
weight is ever formed by autograd.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

from backpack import backpack, extend
from backpack.context import CTX
from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension
from torch import Tensor, nn

from curvscope.graph.sites import GroupedLinear
from curvscope.graph.tap import Tap

Receiver = Callable[[nn.Module, Tensor, Tensor], None]
SITE_CLASSES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    GroupedLinear,
    nn.Embedding,
    Tap,
)


class _Hand(FirstOrderModuleExtension):
    """Passes (module, input, output gradient) on; saves nothing on parameters, unlike BackPACK's own rules."""

    def __call__(
        self,
        extension: FirstOrderBackpropExtension,
        module: nn.Module,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor, ...],
    ) -> None:
        extension.receive(module, module.input0, g_out[0])


class SiteExtension(FirstOrderBackpropExtension):
    """Calls `receive(site, input, output_gradient)` for every site that a backward pass reaches."""

    def __init__(self, receive: Receiver) -> None:
        hand = _Hand()
        super().__init__("curvscope", dict.fromkeys(SITE_CLASSES, hand), fail_mode="ERROR")
        self.receive = receive


@contextlib.contextmanager
def extended(sites: Sequence[nn.Module]) -> Iterator[None]:
    """Sites with BackPACK's hooks while the context lasts; the hooks and what they stored are gone afterwards."""
    before = len(CTX.hook_handles)
    for site in sites:
        extend(site)
    try:
        yield
    finally:
        for handle in CTX.hook_handles[before:]:
            handle.remove()
        del CTX.hook_handles[before:]
        for site in sites:
            for name in [key for key in vars(site) if key.startswith("input") and key[5:].isdigit()]:
                delattr(site, name)
            for name in ("output", "_backpack_extend"):
                if hasattr(site, name):
                    delattr(site, name)


@contextlib.contextmanager
def active(extension: SiteExtension) -> Iterator[None]:
    """The extension receives from every backward pass inside; stored inputs survive for the next pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Full backward hook is firing.*")
        with backpack(extension, retain_graph=True):
            yield
