from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_trainer.errors import InputError
from models.weights import read, state_in

PLACES = ("ema", "model")


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"a.weight": torch.randn(40, 30), "a.bias": torch.arange(3), "b": torch.randn(2).bfloat16()}


def found(path: Path) -> dict[str, Tensor]:
    return state_in(read(path, "task.args.weights"), PLACES, path, "task.args.weights")


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(state) == list(other) and all(
        torch.equal(v, other[k]) and v.dtype == other[k].dtype for k, v in state.items()
    )


@pytest.mark.parametrize(
    "packed",
    [
        lambda state: state,
        lambda state: {"model": state, "ema": None, "counters": {"step": 3}},
        lambda state: {"model": {k: v + 1 for k, v in state.items()}, "ema": state, "args": Namespace(lr=0.1)},
    ],
    ids=["bare", "ours", "average_first"],
)
def test_a_state_dict_comes_back(packed, state, tmp_path):
    for modern in (True, False):
        torch.save(packed(state), tmp_path / "w.pt", _use_new_zipfile_serialization=modern)
        assert same(found(tmp_path / "w.pt"), state)


def test_safetensors(state, tmp_path):
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "w.safetensors")
    got = found(tmp_path / "w.safetensors")
    assert same({name: got[name] for name in state}, state) and len(got) == len(state)


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "is no file of tensors and plain values"),
        (b"no checkpoint at all", "is no file of tensors and plain values"),
        ({"model": 3}, "holds no weights: neither a state dict nor one as ema, model"),
        ({"ema": {}, "model": {"a": torch.zeros(1)}}, "holds no weights"),  # the first that is there, or none
        ([1, 2], "holds no weights"),
        ({}, "holds no weights"),
        ({"model": nn.Linear(1, 1)}, "is no file of tensors and plain values"),  # a pickle that would run code
        (None, "there is no file"),
    ],
)
def test_files_that_are_none(content: Any, told: str, tmp_path):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError) as raised:
        found(path)
    assert str(raised.value).startswith("task.args.weights: ") and "\n" not in str(raised.value)
    assert told in str(raised.value) and str(path) in str(raised.value)


def test_a_damaged_file_and_a_folder(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "w.safetensors").write_bytes(whole[:100])
    for name, told in (("w.pt", "is no file of tensors"), ("w.safetensors", "is no safetensors file"), (".", "folder")):
        with pytest.raises(InputError, match=told):
            found(tmp_path / name)
