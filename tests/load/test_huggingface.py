from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from curvscope.errors import EXIT_BAD_INPUT, CheckpointError
from curvscope.load import load_problem
from curvscope.load.checkpoint import load_checkpoint
from curvscope.load.huggingface import broken_torchvision_hidden
from curvscope.pipeline import plan

with broken_torchvision_hidden():
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def importable() -> Iterator[None]:
    with broken_torchvision_hidden():
        yield


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_folder(make: Any, form: str, tmp_path: Path) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path, max_shard_size="1KB" if form == "sharded" else "1GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = load_checkpoint(tmp_path)
    assert found.name == type(model).__name__
    ids = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        assert torch.equal(found.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_checkpoint(tmp_path).model.parameters()} == {torch.bfloat16}
    batch = torch.arange(8).reshape(2, 4), torch.arange(8).reshape(2, 4)
    planned = plan(tmp_path, batch, loss="causal_lm")
    assert any("stored as bfloat16 are computed in float32" in note for note in planned.notes)


def test_trainers_optimizer(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    named = dict(model.named_parameters())
    plain = [n for n in named if "bias" in n or "LayerNorm" in n]
    order = [n for n in named if n not in plain] + plain
    groups = [
        {"params": [named[n] for n in order if n not in plain], "weight_decay": 0.1},
        {"params": [named[n] for n in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    model(input_ids=torch.zeros(2, 3, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 12}))
    problem = load_problem(tmp_path, (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1])), "cross_entropy")
    assert problem.optimizer.class_name == "AdamW"
    assert problem.optimizer.param_names == tuple(order)
    assert problem.step == 12
    assert (problem.optimizer.clip, problem.optimizer.notes) == (None, ())
    assert problem.optimizer.schedule is None


LOGS = {
    "rising": ([0.1, 0.2], (True, "warming up")),
    "falling": ([0.4, 0.3], (False, "past its peak")),
    "none": ([], (True, "if it is still warming up")),
}


@pytest.mark.parametrize("log", LOGS)
def test_the_trainers_schedule_and_bound(log: str, tmp_path: Path) -> None:
    from transformers import SchedulerType, TrainingArguments, get_scheduler

    model = gpt2()
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_scheduler("cosine", optimizer, 10, 30)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    rates, (assumed, words) = LOGS[log]
    history = [{"learning_rate": rate, "grad_norm": norm} for rate, norm in zip(rates, (0.5, 2.0), strict=False)]
    record = {"global_step": 4, "max_steps": 30, "log_history": history}
    (tmp_path / "trainer_state.json").write_text(json.dumps(record))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    # its constructor wants accelerate, which reading the file does not
    args = object.__new__(TrainingArguments)
    args.__dict__.update(lr_scheduler_type=SchedulerType.COSINE, warmup_steps=10, max_grad_norm=0.7)
    torch.save(args, tmp_path / "training_args.bin")
    found = load_checkpoint(tmp_path).optimizer
    assert (found.clip, found.schedule.assumed) == (None, assumed)
    assert words in found.schedule.problem
    assert any("--clip-norm gives it" in note for note in found.notes)
    trusted = load_checkpoint(tmp_path, trust=True).optimizer
    assert (trusted.clip, trusted.schedule.name, trusted.schedule.problem) == (0.7, "cosine", "")
    assert any("50% of the 2 gradient norms" in note for note in trusted.notes) == bool(rates)
    for row in trusted.schedule.rates:
        assert row.tolist() == [group["lr"] for group in optimizer.param_groups]
        scheduler.step()
    assert len(trusted.schedule.rates) == 27


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


BREAK = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no weights", "save_pretrained")),
    "config": (lambda f: (f / "config.json").write_text("{"), ("config.json can't be read",)),
    "other config": (lambda f: (f / "config.json").write_text("{}"), ("model_type",)),
    "unknown class": (lambda f: change_config(f, architectures=["NoSuchModel"]), ("NoSuchModel",)),
    "function": (lambda f: change_config(f, architectures=["pipeline"]), ("no model class 'pipeline'",)),
    "other class": (
        lambda f: change_config(f, architectures=["GPT2ForSequenceClassification"]),
        ("missing", "score.weight", "architectures"),
    ),
    "own code": (
        lambda f: change_config(f, auto_map={"AutoModel": "evil.Model"}),
        ("evil.Model", "--trust"),
    ),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 40), ("transformers can't load",)),
}


@pytest.mark.parametrize("name", BREAK)
def test_bad_folders(name: str, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    change, words = BREAK[name]
    change(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    for word in words:
        assert word in str(caught.value)
