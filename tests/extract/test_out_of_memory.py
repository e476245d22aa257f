"""Memory that runs out at any stage: smaller pieces, smaller slices, the CPU, and at last a refusal in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import curvscope
from curvscope.errors import AnalysisError, out_of_memory
from curvscope.extract.pieces import Pieces
from curvscope.graph.functional import Graph
from tests.extract.test_many_batches import CLASSES, INPUTS, SOFT, mlp, squares
from tests.many import worst

FAILURES: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 99 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
}


def analyze(**options: Any) -> Any:
    return curvscope.analyze(
        mlp(), (INPUTS, CLASSES), **{"loss": "cross_entropy", "dtype": "float64", "fisher": "exact", **options}
    )


def fail_above(patch: pytest.MonkeyPatch, examples: int, failure: Callable[[], Exception]) -> list[int]:
    """Backward passes over more examples than that run out of memory; the sizes that were tried."""
    tried: list[int] = []
    original = torch.autograd.grad

    def grad(outputs: Any, *args: Any, **options: Any) -> Any:
        if isinstance(outputs, torch.Tensor) and outputs.ndim == 2 and options.get("retain_graph") is not None:
            tried.append(outputs.shape[0])
            if outputs.shape[0] > examples:
                raise failure()
        return original(outputs, *args, **options)

    patch.setattr("curvscope.extract.sweep.torch.autograd.grad", grad)
    return tried


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("examples", [3, 1])
def test_passes_shrink_to_what_fits(name: str, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert out_of_memory(FAILURES[name]())
    whole = analyze()
    tried = fail_above(monkeypatch, examples, FAILURES[name])
    assert worst(whole, analyze()) < 1e-10
    assert tried[0] == 7
    assert 3 in tried
    assert min(tried) == 1  # the last of 7 examples in threes, or pieces of one


def test_a_callable_loss_is_cut_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        return curvscope.analyze(mlp(), (INPUTS, SOFT), loss=squares, dtype="float64", fisher="exact")

    whole = run()
    fail_above(monkeypatch, 3, FAILURES["cuda"])
    assert worst(whole, run()) < 1e-10


def test_a_model_that_can_not_be_cut_up_keeps_its_factors_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pieces, "halve", lambda self: False)
    fail_above(monkeypatch, 3, FAILURES["cpu"])
    with pytest.raises(AnalysisError, match="not enough memory") as caught:
        analyze()
    assert "cpu" in caught.value.where
    assert "--layers" in caught.value.remedy


def test_columns_that_do_not_fit_leave_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = analyze()
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        if shape and shape[0] == 3:  # K = 3 columns
            raise FAILURES["cpu"]()
        return original(self, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    run = analyze()
    for name, layer in run.layers.items():
        if whole.layers[name].row.columns:
            assert torch.allclose(
                torch.tensor(layer.factors["expand"].B), torch.tensor(whole.layers[name].factors["expand"].B)
            )
    kept = {name: layer.row.status for name, layer in run.layers.items()}
    assert "not_assessed" in kept.values()
    assert "memory ran out" in next(layer.row.reason for layer in run.layers.values() if layer.row.reason)
    assert run.model.loss == pytest.approx(whole.model.loss, rel=1e-12)


def test_measures_shrink_their_slices_then_give_the_layer_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvscope.measure import layers

    whole = analyze()
    sizes: list[int] = []
    original = layers.measure_layer

    def measure(extract: Any, wishes: Any, **options: Any) -> Any:
        if extract.spec.name == "2" and extract.columns is not None:
            sizes.append(wishes.piece_bytes)
            raise FAILURES["cuda"]()
        return original(extract, wishes, **options)

    monkeypatch.setattr(layers, "measure_layer", measure)
    run = analyze()
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 2
    assert run.layers["0"].errors == whole.layers["0"].errors
    assert run.layers["2"].row.status == "not_assessed"
    assert "memory ran out" in run.layers["2"].row.reason
    assert {row.status for row in run.layers["2"].errors.values()} == {"not_assessed"}
    assert run.layers["2"].factors["expand"].A.shape == (7, 7)


def test_a_layer_that_can_not_be_measured_at_all_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from curvscope.measure import layers

    whole = analyze()
    original = layers.measure_layer

    def measure(extract: Any, wishes: Any, **options: Any) -> Any:
        if extract.spec.name == "2":
            raise FAILURES["cpu"]()
        return original(extract, wishes, **options)

    monkeypatch.setattr(layers, "measure_layer", measure)
    run = analyze()
    run.save(tmp_path / "run.h5")
    saved = curvscope.open(tmp_path / "run.h5")
    want = whole.layers["0"].errors["kfac_expand"].rel_frobenius
    assert saved.layers["0"].errors["kfac_expand"].rel_frobenius == want
    assert saved.layers["2"].row.status == "not_assessed"
    assert "memory ran out" in saved.layers["2"].row.reason


@pytest.mark.parametrize("stage", ["verify", "survey", "export"])
def test_memory_that_runs_out_before_the_passes_is_refused_in_words(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise FAILURES["cpu"]()

    target = {
        "verify": "curvscope.extract.loaded.verify",
        "survey": "curvscope.extract.survey.exact_columns",
        "export": "curvscope.graph.prepare.build",
    }[stage]
    monkeypatch.setattr(target, fail)
    with pytest.raises(AnalysisError, match="not enough memory"):
        analyze()


def test_from_the_device_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that always runs out of memory ("meta" stands for one): the CPU's numbers, and a note."""
    from curvscope import pipeline

    whole = analyze()
    monkeypatch.setattr(pipeline, "_device", lambda name: torch.device("meta"))
    original = pipeline.get_ready

    def ready(problem: Any, settings: Any, device: torch.device, *args: Any) -> Any:
        if device.type != "cpu":
            raise FAILURES["cuda"]()
        return original(problem, settings, device, *args)

    monkeypatch.setattr(pipeline, "get_ready", ready)
    run = analyze()
    assert worst(whole, run) == 0.0
    assert any("Memory ran out" in note for note in run.notes)
    assert run.info.device == "cpu"


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

    def fail(self: Graph, *args: Any, **options: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr("curvscope.extract.passes.sweep", fail)
    with pytest.raises(RuntimeError, match="something else"):
        analyze()


def test_the_command_line_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    curvscope.capture(tmp_path / "b.pt", model, (INPUTS, CLASSES), loss="cross_entropy")
    monkeypatch.setattr(Pieces, "halve", lambda self: False)
    fail_above(monkeypatch, 0, FAILURES["cpu"])
    with pytest.raises(AnalysisError):
        curvscope.analyze(tmp_path / "b.pt")
