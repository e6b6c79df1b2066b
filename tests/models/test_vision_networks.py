from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from toys import config

from fabric_trainer.checkpoint import load
from fabric_trainer.errors import InputError
from fabric_trainer.freeze import find_units
from fabric_trainer.loop import fit
from fabric_trainer.random import seed_torch
from fabric_trainer.state import State
from fabric_trainer.task import Batch, Loss, Task
from models.vision.fast import FastNet
from models.vision.networks import TORCHVISION, blocks, build, head_names, units, within

timm = pytest.importorskip("timm", reason="needs the extra 'vision'")
models = pytest.importorskip("torchvision.models", reason="needs the extra 'vision'")
StochasticDepth = pytest.importorskip("torchvision.ops").StochasticDepth

CLASSES = 3
# one of each family; with BatchNorm at 64 px, where its last layers still see more than a pixel of each picture
FAMILIES = {
    "resnet18": 64,
    "efficientnet_b0": 64,
    "vit_b_32": 32,
    "swin_t": 32,
    "convnext_tiny": 32,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "densenet121": 64,
    "vgg16": 32,
    "test_vit2": 32,
    "timm/test_resnet": 64,
    "fast": 32,
}
OTHERS = [name for name in TORCHVISION if name not in FAMILIES]


def size_of(name: str) -> int:
    return 32 if name.startswith(("vit", "swin", "convnext", "vgg")) else 64


class TwoPictures(Task):
    """Noise, two pictures of it, of classes 0 and 2."""

    def __init__(self, model: str, size: int) -> None:
        self.model, self.size = model, size

    def dataset(self, split: str) -> list[dict[str, Tensor]] | None:
        pictures = torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        samples = [{"x": x, "y": torch.tensor(y)} for x, y in zip(pictures, (0, 2), strict=True)]
        return samples if split == "train" else None

    def network(self) -> nn.Module:
        made = build(self.model, CLASSES, image_size=self.size)
        if self.model in TORCHVISION and self.model.startswith(
            "vit"
        ):  # begins with a head of zeros, which lets nothing by
            nn.init.normal_(made.heads.head.weight, std=0.02)
        return made

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        losses = nn.functional.cross_entropy(network(batch["x"]), batch["y"], reduction="none")
        return Loss((losses * batch["weight"]).sum())


def one_update(fabric: Fabric, task: Task, folder: Path | None) -> tuple[State, nn.Module]:
    """The state after a step of plain SGD, and the network before it."""
    wanted = config(**{"run.max_epochs": 1, "batch.micro_batch_size": 2, "optim.name": "sgd", "optim.lr": 1e-3})
    state = State(fabric, task, wanted)
    before = copy.deepcopy(state.module)
    fit(fabric, task, wanted, folder, state=state)
    assert state.counters.step == 1
    return state, before


def step_by_hand(network: nn.Module, task: TwoPictures, state: State) -> dict[str, Tensor]:
    """The state after the same step in plain torch."""
    samples = task.dataset("train") or []
    x, y = (torch.stack([samples[i][key] for i in state.order.plan(0)]) for key in "xy")
    seed_torch(torch.device("cpu"), state.config.seed, 0, 0)
    nn.functional.cross_entropy(network.train()(x), y).backward()
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    return network.state_dict()


def of_library(name: str, **arguments: Any) -> nn.Module:
    """What the library's own call makes."""
    if "vit" in name:
        arguments["image_size" if name in TORCHVISION else "img_size"] = 32
    if name == "fast":
        return FastNet(CLASSES)
    if name in TORCHVISION:
        return models.get_model(name, num_classes=CLASSES, **arguments)
    return timm.create_model(name.removeprefix("timm/"), num_classes=CLASSES, **arguments)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


# ---- one update of each -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_one_of_each_family_is_trained_as_in_plain_torch_and_saved_for_its_library(name, fabric, tmp_path):
    task = TwoPictures(name, FAMILIES[name])
    state, before = one_update(fabric, task, tmp_path)
    saved = load(tmp_path / "checkpoints" / "last.pt")["model"]
    for key, value in step_by_hand(before, task, state).items():
        error = (saved[key] - value).abs().max()  # assert_close takes 12 s for a vgg
        assert error <= 1e-4 * value.abs().max() + 1e-6, key
    with torch.device("meta"):  # all that it has comes from the file
        bare = of_library(name).eval()
    bare.load_state_dict(saved, strict=True, assign=True)
    x = torch.rand(2, 3, task.size, task.size)
    with torch.no_grad():
        torch.testing.assert_close(bare(x), state.module.eval()(x), rtol=0, atol=0)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_each_other_takes_one_update_and_is_saved(name, fabric, tmp_path):
    size = size_of(name)
    with torch.device("meta"):
        assert shapes(build(name, CLASSES, image_size=size)) == shapes(of_library(name))
    state, before = one_update(fabric, TwoPictures(name, size), None)
    moved = [key for key, value in before.named_parameters() if not torch.equal(value, state.engine.leaves[key])]
    del before
    units_moved = {
        unit for unit, (_, keys) in find_units(state.module, units(state.module)).items() if {*keys} & {*moved}
    }
    assert units_moved == set(units(state.module))
    assert any(within(key, head) for head in head_names(state.module) for key in moved)
    assert all(torch.isfinite(value).all() for value in state.module.state_dict().values())
    try:
        torch.save(state.module.state_dict(), tmp_path / "weights.pt")
        read = torch.load(tmp_path / "weights.pt", weights_only=True, mmap=True)
        assert all(torch.equal(value, read[key]) for key, value in state.module.state_dict().items())
    finally:
        shutil.rmtree(tmp_path)


# ---- what is built ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm/test_convnext"])
def test_the_draw_is_the_librarys_own(name):
    torch.manual_seed(3)
    made = build(name, CLASSES, image_size=64)
    torch.manual_seed(3)
    for (key, value), (own, expected) in zip(made.state_dict().items(), of_library(name).state_dict().items()):
        assert key == own and torch.equal(value, expected), key
    assert made.training


def test_cifar_stem():
    made = build("resnet34", 10, image_size=32, stem="cifar")
    wide = {"conv1.weight": torch.Size([64, 3, 3, 3])}
    assert shapes(made) == shapes(models.resnet34(num_classes=10)) | wide
    seen = []
    made.layer1.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    made.layer4.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    made.eval()(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 64, 32, 32), (1, 512, 4, 4)]
    spread = made.conv1.weight.std().item()
    assert spread == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # fan-out, as torchvision's own
    with pytest.raises(InputError, match=r"task\.args\.stem: only torchvision's resnets .* not convnext_tiny"):
        build("convnext_tiny", 10, image_size=32, stem="cifar")
    with pytest.raises(InputError, match=r"task\.args\.stem: small"):
        build("resnet18", 10, image_size=32, stem="small")


def rates(network: nn.Module) -> list[float]:
    kinds = (StochasticDepth, timm.layers.DropPath)
    return [m.p if isinstance(m, StochasticDepth) else m.drop_prob for m in network.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny", "swin_t", "timm/convnext_atto"])
def test_drop_path_is_the_librarys(name):
    with torch.device("meta"):
        made = rates(build(name, CLASSES, image_size=64, drop_path=0.3))
        if name == "swin_t":
            sizes: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 96, "depths": [2, 2, 6, 2]}
            heads = {"num_heads": [3, 6, 12, 24], "window_size": [7, 7]}
            expected = rates(models.SwinTransformer(**sizes, **heads, stochastic_depth_prob=0.3))
        else:
            key = "stochastic_depth_prob" if name in TORCHVISION else "drop_path_rate"
            expected = rates(of_library(name, **{key: 0.3}))
        assert made == pytest.approx(expected) and 0.25 < max(made) < 0.3001
        assert not any(rates(build(name, CLASSES, image_size=64)))


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "vgg16", "mobilenet_v2", "densenet121", "timm/vgg11"])
def test_no_drop_path_where_there_is_none(name):
    with torch.device("meta"), pytest.raises(InputError, match=r"^task\.args\.drop_path: "):
        build(name, CLASSES, image_size=32, drop_path=0.1)


def test_timms_default_drop_path_is_left_out():
    name = "swin_tiny_patch4_window7_224"
    with torch.device("meta"):
        assert any(rates(timm.create_model(name)))
        assert not any(rates(build(name, CLASSES, image_size=64)))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_is_a_rate(rate):
    with pytest.raises(InputError, match=r"task\.args\.drop_path: .* is no rate"):
        build("swin_t", CLASSES, image_size=32, drop_path=rate)


@pytest.mark.parametrize(
    "name, size, told",
    [
        ("vit_b_16", 40, "vit_b_16 takes multiples of its patch, 16 px, not 40"),
        ("vit_b_32", 0, "vit_b_32 takes multiples of its patch, 32 px, not 0"),
        ("vgg16", 16, "vgg16 can't take pictures of 16 px: "),
        ("densenet121", 16, "densenet121 can't take pictures of 16 px: "),
        ("convnext_tiny", 16, "convnext_tiny can't take pictures of 16 px: "),
        ("test_vit", 40, "test_vit takes multiples of its patch, 16 px, not 40"),
        ("timm/vgg11", 16, "timm/vgg11 can't take pictures of 16 px: "),
    ],
)
def test_a_size_that_a_network_cannot_take(name, size, told):
    with torch.device("meta"), pytest.raises(InputError) as raised:
        build(name, CLASSES, image_size=size)
    assert str(raised.value).startswith(f"task.args.image_size: {told}") and "\n" not in str(raised.value)


def test_sizes_reach_transformers():
    with torch.device("meta"):
        assert build("vit_b_16", CLASSES, image_size=64).encoder.pos_embedding.shape == (1, 17, 768)
        assert build("test_vit", CLASSES, image_size=64).pos_embed.shape == (1, 17, 64)


@pytest.mark.parametrize(
    "name, told",
    [("resnet19", "resnet18"), ("convnext_tinny", "convnext_tiny"), ("timm/vit_tiny_patch16", "vit_tiny_patch16_224")],
)
def test_an_unknown_name_tells_the_nearest(name, told):
    with pytest.raises(
        InputError, match=rf"^task\.args\.model: {name.removeprefix('timm/')} is no .* near it: .*{told}"
    ):
        build(name, CLASSES, image_size=32)


@pytest.mark.parametrize(
    "name, args, told",
    [
        ("resnet18", {"width": 2}, "resnet18 does not take it: .*'width'"),
        ("timm/test_resnet", {"width": 2}, "test_resnet does not take it: .*'width'"),
        ("vit_b_32", {"dropout": 2.0}, "vit_b_32 can't be made so: dropout probability"),
        ("timm/test_resnet", {"act_layer": "nonsense"}, "test_resnet can't be made so: "),
        ("resnet18", {"num_classes": 5}, "num_classes is task.args.num_classes"),
        ("swin_t", {"stochastic_depth_prob": 0.5}, "stochastic_depth_prob is task.args.drop_path"),
    ],
)
def test_arguments_of_the_builders(name, args, told):
    with pytest.raises(InputError, match=rf"^task\.args\.model_args: {told}"):
        build(name, CLASSES, image_size=32, args=args)


def test_arguments_reach_the_builders():
    with torch.device("meta"):
        assert build("mobilenet_v2", CLASSES, image_size=64, args={"width_mult": 0.5}).features[0][0].out_channels == 16
        assert build("test_resnet", CLASSES, image_size=64, args={"drop_rate": 0.4}).drop_rate == 0.4


def test_a_network_that_does_not_classify():
    told = r"^task\.args\.model: test_resnet gives list for a picture, not \(1, 3\)"
    with torch.device("meta"), pytest.raises(InputError, match=told):
        build("test_resnet", CLASSES, image_size=32, args={"features_only": True})


def test_without_the_libraries(monkeypatch):
    for library, name in (("torchvision.models", "resnet18"), ("timm", "resnet26")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(InputError, match=r"pip install 'fabric-trainer\[vision\]'"):
            build(name, CLASSES, image_size=32)


# ---- parts --------------------------------------------------------------------------------------------------------

ENCODER = "encoder.layers.encoder_layer_"
# (class of the blocks, how many, head, units in the order of unfreezing)
PARTS: dict[str, tuple[str, int, str, dict[str, list[str]]]] = {
    "resnet50": (
        "Bottleneck",
        16,
        "fc",
        {"layer4": ["layer4"], "layer3": ["layer3"], "layer2": ["layer2"], "layer1": ["layer1"]}
        | {"stem": ["conv1", "bn1"]},
    ),
    "efficientnet_b0": (
        "MBConv",
        16,
        "classifier.1",
        {"features.7": ["features.7", "features.8"]}
        | {f"features.{i}": [f"features.{i}"] for i in range(6, 0, -1)}
        | {"stem": ["features.0"]},
    ),
    "vit_b_32": (
        "EncoderBlock",
        12,
        "heads.head",
        {ENCODER + "11": [ENCODER + "11", "encoder.ln"]}
        | {f"{ENCODER}{i}": [f"{ENCODER}{i}"] for i in range(10, -1, -1)}
        | {"stem": ["class_token", "conv_proj", "encoder.pos_embedding"]},
    ),
    "swin_t": (
        "SwinTransformerBlock",
        12,
        "head",
        {"features.7": ["features.6", "features.7", "norm"], "features.5": ["features.4", "features.5"]}
        | {"features.3": ["features.2", "features.3"], "features.1": ["features.1"], "stem": ["features.0"]},
    ),
    "convnext_tiny": (
        "CNBlock",
        18,
        "classifier.2",
        {"features.7": ["features.6", "features.7", "classifier.0"], "features.5": ["features.4", "features.5"]}
        | {"features.3": ["features.2", "features.3"], "features.1": ["features.1"], "stem": ["features.0"]},
    ),
    "mobilenet_v2": (
        "InvertedResidual",
        17,
        "classifier.1",
        {"features.17": ["features.17", "features.18"]}
        | {f"features.{i}": [f"features.{i}"] for i in range(16, 0, -1)}
        | {"stem": ["features.0"]},
    ),
    "mobilenet_v3_small": (
        "InvertedResidual",
        11,
        "classifier.3",
        {"features.11": ["features.11", "features.12", "classifier.0"]}
        | {f"features.{i}": [f"features.{i}"] for i in range(10, 0, -1)}
        | {"stem": ["features.0"]},
    ),
    "densenet121": (
        "_DenseLayer",
        58,
        "classifier",
        {"features.denseblock4": ["features.transition3", "features.denseblock4", "features.norm5"]}
        | {f"features.denseblock{i}": [f"features.transition{i - 1}", f"features.denseblock{i}"] for i in (3, 2)}
        | {"features.denseblock1": ["features.denseblock1"], "stem": ["features.conv0", "features.norm0"]},
    ),
    "vgg16": (
        "",
        0,
        "classifier.6",
        {place: [place] for place in ("classifier.3", "classifier.0")}
        | {f"features.{i}": [f"features.{i}"] for i in (28, 26, 24, 21, 19, 17, 14, 12, 10, 7, 5, 2)}
        | {"stem": ["features.0"]},
    ),
    "test_vit": (
        "Block",
        6,
        "head",
        {"blocks.5": ["blocks.5", "norm"]}
        | {f"blocks.{i}": [f"blocks.{i}"] for i in range(4, -1, -1)}
        | {"stem": ["cls_token", "pos_embed", "patch_embed"]},
    ),
    "fast": (
        "Block",
        3,
        "head",
        {f"blocks.{i}": [f"blocks.{i}"] for i in (2, 1, 0)} | {"stem": ["stem"]},
    ),
    "convnext_atto": (
        "ConvNeXtBlock",
        12,
        "head.fc",
        {"stages.3": ["stages.3", "head.norm"], "stages.2": ["stages.2"], "stages.1": ["stages.1"]}
        | {"stages.0": ["stages.0"], "stem": ["stem"]},
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_blocks_units_and_head(name):
    kind, count, head, expected = PARTS[name]
    with torch.device("meta"):
        made = build(name, CLASSES, image_size=32)
    found = blocks(made)
    assert {type(block).__name__ for block in found} == ({kind} if kind else set()) and len(found) == count
    assert head_names(made) == [head] and made.get_submodule(head).out_features == CLASSES
    assert list(units(made).items()) == list(expected.items())


@pytest.mark.parametrize("name", ["resnet18", "timm/swin_tiny_patch4_window7_224", "timm/levit_128s", "test_resnet"])
def test_each_parameter_is_in_one_unit_or_in_the_head(name):
    with torch.device("meta"):
        made = build(name, CLASSES, image_size=224)
    own = [key for _, keys in find_units(made, units(made)).values() for key in keys]
    rest = {key for key, _ in made.named_parameters()} - set(own)
    assert len(own) == len(set(own)) and own
    assert rest and all(any(within(key, head) for head in head_names(made)) for key in rest)


def test_what_is_frozen_already_is_in_no_unit():
    made = build("resnet18", CLASSES, image_size=64)
    made.conv1.requires_grad_(False)
    assert units(made)["stem"] == ["bn1"]
    made.bn1.requires_grad_(False)
    assert list(units(made)) == ["layer4", "layer3", "layer2", "layer1"]
