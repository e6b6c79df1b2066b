from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from fabric_trainer.errors import InputError
from models.vision.networks import build

timm = pytest.importorskip("timm", reason="needs the extra 'vision'")
models = pytest.importorskip("torchvision.models", reason="needs the extra 'vision'")


@pytest.fixture(scope="module")
def library() -> nn.Module:
    """A resnet of five classes."""
    torch.manual_seed(5)
    return models.resnet18(num_classes=5)


def made(path: Path, classes: int, model: str = "resnet18", **changes: Any) -> tuple[nn.Module, list[str]]:
    told: list[str] = []
    return build(model, classes, image_size=64, pretrained=str(path), tell=told.append, **changes), told


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(state) == list(other) and all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize(
    "packed",
    [
        lambda state: state,
        lambda state: {"model": state, "ema": None, "counters": {"step": 3}},  # ours
        lambda state: {"state_dict": state, "epoch": 3, "args": Namespace(lr=0.1)},  # timm's
        lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
        lambda state: {"model": {"module." + name: value for name, value in state.items()}},  # of DDP
        lambda state: {"state_dict": {"model." + name: value for name, value in state.items()}},  # of a LightningModule
    ],
    ids=["bare", "ours", "timm", "timm_ema", "ddp", "lightning"],
)
def test_weights_come_back(packed, library, tmp_path):
    torch.save(packed(library.state_dict()), tmp_path / "w.pt")
    network, told = made(tmp_path / "w.pt", 5)
    assert same(network.state_dict(), library.state_dict()) and told == []


def test_safetensors_and_files_of_old(library, tmp_path):
    pytest.importorskip("safetensors.torch").save_file(library.state_dict(), tmp_path / "w.safetensors")
    torch.save(library.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "old.pth"):
        found = made(tmp_path / name, 5)[0].state_dict()
        assert all(torch.equal(value, found[key]) for key, value in library.state_dict().items())


def test_a_head_of_other_classes_is_skipped_and_named(library, tmp_path):
    torch.save(library.state_dict(), tmp_path / "w.pt")
    torch.manual_seed(1)
    network, told = made(tmp_path / "w.pt", 3)
    torch.manual_seed(1)
    expected = library.state_dict() | {
        k: v for k, v in models.resnet18(num_classes=3).state_dict().items() if "fc" in k
    }
    assert same(network.state_dict(), expected)
    assert told == [
        "task.args.pretrained: fc.weight 5 x 512 instead of 3 x 512: skipped, it starts anew",
        "task.args.pretrained: fc.bias 5 instead of 3: skipped, it starts anew",
    ]


def test_anything_else_is_listed(library, tmp_path):
    state = library.state_dict()
    del state["bn1.weight"], state["fc.bias"]
    torch.save(state | {"extra": torch.zeros(1), "conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "w.pt")
    with pytest.raises(InputError) as raised:
        made(tmp_path / "w.pt", 3)
    assert str(raised.value) == (
        f"task.args.pretrained: {tmp_path / 'w.pt'} is not of this network: missing bn1.weight, fc.bias; "
        "unexpected extra; misshapen conv1.weight 64 x 3 x 3 x 3 instead of 64 x 3 x 7 x 7"
    )


def test_a_cifar_stem_comes_back_too(tmp_path):
    network = build("resnet18", 5, image_size=32, stem="cifar")
    torch.save(network.state_dict(), tmp_path / "w.pt")
    assert same(made(tmp_path / "w.pt", 5, stem="cifar")[0].state_dict(), network.state_dict())
    with pytest.raises(InputError, match=r"misshapen conv1\.weight"):
        made(tmp_path / "w.pt", 5)


def test_timms_networks_read_files_alike(tmp_path):
    network = timm.create_model("test_convnext", num_classes=5)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pt")
    assert same(made(tmp_path / "w.pt", 5, "test_convnext")[0].state_dict(), network.state_dict())
    told = made(tmp_path / "w.pt", 3, "test_convnext")[1]
    assert [line.split()[1] for line in told] == ["head.fc.weight", "head.fc.bias"]


def test_names_of_old_densenets(tmp_path):
    state = models.densenet121(num_classes=3).state_dict()
    olden = {}
    for name, value in state.items():
        start, dot, rest = name.rpartition("denselayer")
        for part in ("norm", "relu", "conv"):
            rest = rest.replace(f"{part}1.", f"{part}.1.").replace(f"{part}2.", f"{part}.2.")
        olden[start + dot + rest] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in olden and set(olden) != set(state)
    torch.save(olden, tmp_path / "w.pt")
    assert same(made(tmp_path / "w.pt", 3, "densenet121")[0].state_dict(), state)


def test_what_holds_no_weights(tmp_path):
    """Every way in which a file can be none is in test_weights."""
    path = tmp_path / "w.pt"
    torch.save({"model": 3}, path)
    with pytest.raises(InputError) as raised:
        made(path, 3)
    assert str(raised.value) == (
        f"task.args.pretrained: {path} holds no weights: neither a state dict nor one as "
        "state_dict_ema, model_ema, state_dict, model"
    )


def test_the_librarys_own_weights(library, monkeypatch):
    """What torchvision would fetch, in its place."""
    published = models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(type(published), "get_state_dict", lambda self, *args, **kwargs: library.state_dict())
    told: list[str] = []
    network = build("resnet18", 5, image_size=64, pretrained=True, tell=told.append)
    assert same(network.state_dict(), library.state_dict()) and told == []


def test_weights_that_cannot_be_fetched(monkeypatch):
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(
        InputError, match=r"^task\.args\.pretrained: .* can't be fetched, give the path of a file: .*route"
    ):
        build("resnet18", 5, image_size=64, pretrained=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^task\.args\.pretrained: .* resnet10t can't be fetched, give the path of"):
        build("resnet10t", 5, image_size=64, pretrained=True)


def test_a_tag_that_timm_does_not_have():
    with pytest.raises(InputError, match=r"^task\.args\.model: resnet18\.nonsense can't be made so: "):
        build("resnet18.nonsense", 5, image_size=64)


def test_no_weights_without_memory(library, tmp_path):
    torch.save(library.state_dict(), tmp_path / "w.pt")
    for pretrained in (True, str(tmp_path / "w.pt")):
        with torch.device("meta"), pytest.raises(InputError, match=r"^task\.args\.pretrained: fabric\.fsdp\.meta_init"):
            build("resnet18", 5, image_size=64, pretrained=pretrained)
