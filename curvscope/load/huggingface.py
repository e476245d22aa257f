"""A Hugging Face folder: config.json beside the weights."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from curvscope.errors import CheckpointError
from curvscope.load.importing import describe, listed

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_folder(folder: Path, *, trust: bool) -> nn.Module:
    """The model that config.json names in `architectures`, in the dtype its weights were stored in.

    Nothing is downloaded, and no code in the folder is run without `trust`.

    Raises:
        CheckpointError: transformers is absent, the class is unknown or in the folder's own code, or weights
            are missing.
    """
    config = _read_config(folder)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise CheckpointError(
            f"The folder has a config.json but no weights ({listed(list(WEIGHT_FILES))}).",
            where=str(folder),
            remedy="Save it with model.save_pretrained(folder). Weights in pieces (pytorch_model_fsdp_0, "
            "global_step...) "
            "must be consolidated first.",
        )
    if config.get("auto_map") and not trust:
        raise CheckpointError(
            f"The model is defined by code in the folder: {listed([str(v) for v in config['auto_map'].values()])}.",
            where=str(folder / "config.json"),
            remedy="Read that code, and if you trust it add --trust.",
        )
    cls, remote = _model_class(folder, config, trust)
    options = {"trust_remote_code": True} if remote else {}
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                str(folder), local_files_only=True, dtype="auto", output_loading_info=True, **options
            )
    except Exception as cause:
        raise CheckpointError(
            f"transformers can't load the folder: {describe(cause)}.",
            where=str(folder),
            remedy="Check that the folder is complete, or load the model yourself and use curvscope.capture.",
        ) from cause
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights are missing from the folder ({listed(missing, 6)}); transformers would "
            "make "
            "them up at random.",
            where=str(folder),
            remedy="Check `architectures` in config.json: it must name the class that was trained.",
        )
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as cause:
        raise CheckpointError(
            f"config.json can't be read: {describe(cause)}.",
            where=str(folder / "config.json"),
            remedy="Save the folder again with model.save_pretrained(folder).",
        ) from cause
    if not isinstance(config, dict) or not ("model_type" in config or "architectures" in config):
        raise CheckpointError(
            "config.json is not the configuration of a transformers model (no model_type).",
            where=str(folder / "config.json"),
            remedy="Give the file with the weights instead of the folder, and --model package.module:factory.",
        )
    return config


def _model_class(folder: Path, config: Mapping[str, Any], trust: bool) -> tuple[Any, bool]:
    """The class to load with, and whether its code lies in the folder."""
    try:
        with _quiet():
            import transformers
    except Exception as cause:
        raise CheckpointError(
            f"A Hugging Face folder needs the package transformers ({describe(cause)}).",
            where=str(folder),
            remedy="Install it: pip install transformers (with a torchvision that matches your torch, or none).",
        ) from cause
    names = config.get("architectures") or []
    if config.get("auto_map") and trust:
        auto = next((a for a in config["auto_map"] if a.startswith("AutoModel")), "AutoModel")
        return getattr(transformers, auto), True
    if not names:
        return transformers.AutoModel, False
    try:
        with _quiet():
            cls = getattr(transformers, str(names[0]), None)
    except Exception as cause:
        raise CheckpointError(
            f"transformers can't provide {names[0]}: {describe(cause)}.",
            where=str(folder / "config.json"),
            remedy="Check that its own requirements are installed in versions that match.",
        ) from cause
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_pretrained")):
        raise CheckpointError(
            f"transformers {transformers.__version__} has no model class {names[0]!r}.",
            where=str(folder / "config.json"),
            remedy="Update transformers, or load the model yourself and use curvscope.capture.",
        )
    return cls, False


@contextlib.contextmanager
def broken_torchvision_hidden() -> Iterator[None]:
    """A torchvision that can't be imported is as good as absent, also to transformers.

    Built for another torch (a CUDA build beside a CPU one), it fails when imported, and transformers, which
    only asks whether it is installed, fails with it even for models that have no use for it.
    """
    broken = False
    try:
        import torchvision  # type: ignore[import-untyped,unused-ignore]  # noqa: F401
    except Exception:
        broken = True
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if broken:
            sys.modules.pop("torchvision", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers prints progress bars and load reports; what matters in them is checked here."""
    with (
        broken_torchvision_hidden(),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
