"""Layer names: as components of HDF5 paths, and shortened to a width without losing which is which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from curvscope.present.numbers import count


def encode(name: str) -> str:
    """A layer's name as one HDF5 path component: "%" is written %25, "/" is written %2F, "." alone %2E."""
    encoded = name.replace("%", "%25").replace("/", "%2F")
    return "%2E" if encoded == "." else encoded


def decode(component: str) -> str:
    """The name that `encode` wrote."""
    return component.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def shorten(names: Sequence[str], width: int, ellipsis: str = "…") -> list[str]:
    """The names in at most `width` characters each, all different if the names are.

    Parts of the path that say least go first: leading words, then words in between; numbers (which block) and
    the last part (which layer) go last.
    """
    taken: set[str] = {name for name in names if len(name) <= width}
    short: list[str] = []
    for name in names:
        if len(name) <= width:
            short.append(name)
            continue
        choice = next((c for c in _candidates(name, width, ellipsis) if c not in taken), name[:width])
        taken.add(choice)
        short.append(choice)
    return short


def _candidates(name: str, width: int, ellipsis: str) -> Iterator[str]:
    """Shorter forms that fit, the most readable first."""
    parts = name.split(".")
    words = [i for i, part in enumerate(parts[:-1]) if not part.isdigit()]
    # Dropping the first word may make decoder the same as encoder: the words behind it are tried next.
    for order in (words, words[1:] + words[:1]):
        for taken in range(1, len(order) + 1):
            *dropped, last = order[:taken]
            for kept in range(min(width, len(parts[last]) - 1), -1, -1):
                form = _without(parts, set(dropped), last, kept, ellipsis)
                if kept != 1 and len(form) <= width:
                    yield form
                    break
    for head in range(max(0, (width - len(ellipsis)) // 3), -1, -1):
        tail = width - len(ellipsis) - head
        if tail > 0:
            yield name[:head] + ellipsis + name[-tail:]
    for number in range(1, 10**6):
        mark = f"{ellipsis}{number}"
        yield name[: max(0, width - len(mark))] + mark


def _without(parts: list[str], dropped: set[int], cut: int, kept: int, ellipsis: str) -> str:
    """The path without the dropped parts, with `kept` letters of part `cut`; an ellipsis for each gap."""
    path = ""
    for index, part in enumerate(parts):
        if index in dropped or (index == cut and kept == 0):
            path += "" if path.endswith(ellipsis) else ellipsis
            continue
        dot = "." if path and not path.endswith(ellipsis) else ""
        path += dot + (part[:kept] + ellipsis if index == cut else part)
    return path


def some(names: list[str], noun: str, most: int = 2) -> str:
    """The layers' names as they are spoken, or how many there are."""
    return ", ".join(map(spoken, names)) if len(names) <= most else count(len(names), noun)


def spoken(layer: str) -> str:
    """A layer's name in running text: a bare number, as in an nn.Sequential, is told to be a layer's."""
    return f"layer {layer}" if layer.replace(".", "").isdigit() else layer
