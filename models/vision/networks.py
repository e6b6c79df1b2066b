"""Networks for image classification: torchvision's, timm's and our own, as their libraries make them.

``build`` returns the bare library module, so a checkpoint's ``model`` loads into it without this repository.
``blocks``, ``units`` and ``head_names`` find a network's parts by its structure, whatever library it is from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fabric_trainer.errors import InputError
from models.vision.weights import load_weights

TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"),
    *("vit_b_16", "vit_b_32", "vit_l_16", "swin_t", "swin_s", "swin_b"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("densenet121", "densenet161", "densenet169", "vgg16", "vgg19"),
)
OURS = {  # arguments of the libraries' builders that have a key of their own
    "num_classes": "num_classes",
    "image_size": "image_size",
    "img_size": "image_size",
    "weights": "pretrained",
    "pretrained": "pretrained",
    "stochastic_depth_prob": "drop_path",
    "drop_path_rate": "drop_path",
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_REFUSALS = (RuntimeError, ValueError, AssertionError, ArithmeticError, LookupError)


def build(
    model: str,
    classes: int,
    *,
    image_size: int,
    pretrained: bool | str = False,
    drop_path: float = 0.0,
    stem: str = "imagenet",
    args: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = print,
) -> nn.Module:
    """The library's own module with ``classes`` outputs: float (B, 3, image_size, image_size) -> (B, classes).

    model: one of ``TORCHVISION``, ``fast`` (ours), or a name of timm's, as it is or as timm/NAME.
    pretrained: true for the library's own weights, or the path of a file (see ``weights.load_weights``).
    drop_path: stochastic depth (arXiv 1603.09382), the rate of the last block, rising from 0 at the first; 0 is none,
    whatever the library's default. stem: ``cifar`` begins a resnet of torchvision's with a 3x3 convolution of stride 1
    and no pooling (arXiv 1512.03385, section 4.2). args: further ones of the library's builder. tell: gets a line for
    each thing that weights don't bring.

    Raises InputError, naming ``task.args.<key>``, for a name, size, rate, stem, argument or file that won't do.
    """
    args = dict(args or {})
    if pretrained and torch.get_default_device().type == "meta":
        raise InputError("task.args.pretrained: fabric.fsdp.meta_init draws new weights: leave out one of the two")
    if not 0 <= drop_path < 1:
        raise InputError(f"task.args.drop_path: {drop_path} is no rate, 0 up to 1")
    if stem not in ("imagenet", "cifar"):
        raise InputError(f"task.args.stem: {stem} is neither imagenet nor cifar")
    if stem == "cifar" and not (model in TORCHVISION and model.startswith("resnet")):
        raise InputError(f"task.args.stem: only torchvision's resnets have a cifar stem, not {model}")
    for name in args:
        if name in OURS:
            raise InputError(f"task.args.model_args: {name} is task.args.{OURS[name]}")
    if model == "fast":
        network = _fast(classes, drop_path, args)
    elif model in TORCHVISION:
        network = _torchvision(model, classes, image_size, drop_path, args)
    else:
        network = _timm(model.removeprefix("timm/"), classes, image_size, drop_path, args, pretrained is True, tell)
    if stem == "cifar":
        _begin_small(network)
    _try(network, model, classes, image_size)
    if isinstance(pretrained, str):
        load_weights(network, pretrained, head_names(network), tell)
    elif pretrained and model == "fast":
        raise InputError("task.args.pretrained: fast has no published weights, give the path of a file")
    elif pretrained and model in TORCHVISION:
        from torchvision.models import get_model_weights

        load_weights(network, get_model_weights(model).DEFAULT, head_names(network), tell)
    return network


def colours(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and spread, of red, green and blue in [0, 1], that pictures had where the library trained its weights."""
    from timm import get_pretrained_cfg
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    published = None if model in TORCHVISION else get_pretrained_cfg(model.removeprefix("timm/"))
    return (published.mean, published.std) if published else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


# ---- of each library ----------------------------------------------------------------------------------------------


def _fast(classes: int, drop_path: float, args: dict[str, Any]) -> nn.Module:
    from models.vision.fast import FastNet

    if drop_path:
        raise InputError(f"task.args.drop_path: fast has no blocks to drop, leave out {drop_path}")
    return _made("fast", lambda: FastNet(classes, **args), "task.args.model_args")


def _torchvision(name: str, classes: int, size: int, drop_path: float, args: dict[str, Any]) -> nn.Module:
    try:
        from torchvision.models import SwinTransformer, get_model
    except ImportError:
        raise _needs("torchvision", name) from None
    if drop_path and not name.startswith(("efficientnet", "swin", "convnext")):
        raise InputError(f"task.args.drop_path: {name} has none; efficientnet, swin, convnext and most of timm's have")
    own: dict[str, Any] = {}
    if name.startswith("vit"):
        own["image_size"], patch = size, int(name.rpartition("_")[2])
        if size < 1 or size % patch:
            raise InputError(f"task.args.image_size: {name} takes multiples of its patch, {patch} px, not {size}")
    elif name.startswith(("efficientnet", "convnext")):
        own["stochastic_depth_prob"] = drop_path
    network = _made(name, lambda: get_model(name, num_classes=classes, **own, **args), "task.args.model_args")
    if isinstance(network, SwinTransformer):  # whose builders fix the rate
        swins = blocks(network)
        for place, block in enumerate(swins):
            block.stochastic_depth.p = drop_path * place / (len(swins) - 1)  # type: ignore[union-attr, operator]
    return network


def _timm(
    name: str,
    classes: int,
    size: int,
    drop_path: float,
    args: dict[str, Any],
    pretrained: bool,
    tell: Callable[[str], None],
) -> nn.Module:
    try:
        import timm
        from timm.layers import DropPath
    except ImportError:
        raise _needs("timm", name) from None
    if not timm.is_model(name):
        known = list(dict.fromkeys(["fast", *TORCHVISION, *timm.list_models()]))
        near = get_close_matches(name.partition(".")[0], known, n=5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise InputError(f"task.args.model: {name} is no name of torchvision's 28, of timm's, or fast{hint}")
    own, key = dict[str, Any](), "task.args.model_args"
    published = _made(name, lambda: timm.get_pretrained_cfg(name), "task.args.model")  # not for a tag of nobody's
    if published is not None and published.fixed_input_size and size != published.input_size[1]:
        own["img_size"], key = size, "task.args.image_size" + f" or {key}" * bool(args)
    if drop_path:
        own["drop_path_rate"] = drop_path
    network = _made(
        name, lambda: timm.create_model(name, pretrained=pretrained, num_classes=classes, **own, **args), key
    )
    drops = [module for module in network.modules() if isinstance(module, DropPath)]
    if drop_path and not any(drop.drop_prob for drop in drops):
        raise InputError(f"task.args.drop_path: {name} has none, leave out {drop_path}")
    if not drop_path:
        for drop in drops:
            drop.drop_prob = 0.0
    if pretrained and network.pretrained_cfg["num_classes"] != classes:
        for head in head_names(network):
            tell(f"task.args.pretrained: {head} starts anew, with {classes} classes")
    return network


def _made(name: str, make: Callable[[], Any], key: str) -> Any:
    """What the library makes, or its refusal as one line: of an argument, of a download, or of a value (``key``)."""
    try:
        return make()
    except TypeError as error:
        key = "task.args.image_size" if "'img_size'" in str(error) else "task.args.model_args"
        key = "task.args.drop_path" if "'drop_path_rate'" in str(error) else key
        raise InputError(f"{key}: {name} does not take it: {_line(error)}") from error
    except OSError as error:
        raise InputError(
            f"task.args.pretrained: the weights of {name} can't be fetched, give the path of a file: {_line(error)}"
        ) from error
    except (*_REFUSALS, AttributeError) as error:
        key = "task.args.model" if "retrained" in str(error) else key  # timm: no such tag, or no weights at all
        raise InputError(f"{key}: {name} can't be made so: {_line(error)}") from error


def _begin_small(network: nn.Module) -> None:
    """3x3, stride 1, drawn as torchvision draws a resnet's convolutions, and no pooling after it."""
    width = network.conv1.out_channels
    network.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


@torch.no_grad()
def _try(network: nn.Module, model: str, classes: int, size: int) -> None:
    """One forward of one black picture: the only way to know that any of some thousand networks takes the size."""
    embedding = getattr(network, "patch_embed", None)
    patch = getattr(embedding, "patch_size", 1)  # what a convolution would cut off at the border
    patch = patch if isinstance(patch, int) else patch[-1]
    if size % patch and not getattr(embedding, "dynamic_img_pad", False):
        raise InputError(f"task.args.image_size: {model} takes multiples of its patch, {patch} px, not {size}")
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        classified = network(torch.zeros(1, 3, size, size))
    except _REFUSALS as error:
        raise InputError(f"task.args.image_size: {model} can't take pictures of {size} px: {_line(error)}") from error
    for module, mode in modes.items():
        module.training = mode
    shape = tuple(classified.shape) if isinstance(classified, torch.Tensor) else type(classified).__name__
    if shape != (1, classes):
        raise InputError(f"task.args.model: {model} gives {shape} for a picture, not (1, {classes})")


def _needs(library: str, name: str) -> InputError:
    return InputError(f"task.args.model: {name} is {library}'s: pip install 'fabric-trainer[vision]'")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- the parts of a network ---------------------------------------------------------------------------------------


def head_names(network: nn.Module) -> list[str]:
    """The modules that give the classes: by timm's own account, else the last linear layer."""
    told = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if told:
        return [told] if isinstance(told, str) else list(told)
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts, in the network's order: BasicBlock, MBConv, EncoderBlock, … None lies in another, and a
    vgg has none. A class is repeated where a container holds two of it in a row; bare layers, and stages that
    hold blocks, do not count."""
    return list(_named_blocks(network).values())


def units(network: nn.Module) -> dict[str, list[str]]:
    """Unit -> patterns, in the order of unfreezing (``freeze.units``): the stages, the deepest first, and ``stem``.

    A stage is a part that holds blocks, or a block itself where no stages are above it, together with what leads to it
    (a downsampling layer) and, for the last one, what follows it (a norm). The head is in none. Where there are no
    blocks each layer is a unit, with the norms before it.
    """
    heads, named = head_names(network), list(_named_blocks(network))
    # what is taken apart: all that leads to where the blocks part, or every container, and what holds the head
    if named:
        apart = set.intersection(*(set(_above(name)) for name in named))
    else:
        apart = {name for name, module in network.named_modules() if isinstance(module, _CONTAINERS)}
    apart |= {path for head in heads for path in _above(head)}
    places: dict[str, bool] = {}  # what remains whole -> whether it has more than biases and norms
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not any(within(name, head) for head in heads):
            place = next(path for path in (*_above(name), name) if path not in apart)
            places[place] = places.get(place, False) or parameter.ndim > 1
    if named:
        stages = [place for place in places if any(within(name, place) for name in named)]
    else:
        stages = [place for place, has_weights in places.items() if has_weights][1:]
    made: dict[str, list[str]] = {"stem": []}
    waiting: list[str] = []
    for place in places:
        if place in stages:
            made[place], waiting = [*waiting, place], []
        else:
            (made["stem"] if len(made) == 1 else waiting).append(place)
    made[next(reversed(made))] += waiting
    return {unit: patterns for unit, patterns in reversed(made.items()) if patterns}


def within(name: str, place: str) -> bool:
    """Whether the module or parameter is that place or lies in it."""
    return name == place or name.startswith(place + ".")


def _above(name: str) -> list[str]:
    """a.b.c -> a, a.b"""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _named_blocks(network: nn.Module) -> dict[str, nn.Module]:
    repeated = {
        type(one)
        for container in network.modules()
        if isinstance(container, _CONTAINERS)
        for one, following in pairwise(container.children())
        if type(one) is type(following) and _is_block(one)
    }

    def outermost(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if isinstance(module, _CONTAINERS) and type(child) in repeated:
                yield prefix + name, child
            else:
                yield from outermost(child, f"{prefix}{name}.")

    return dict(outermost(network, ""))


def _is_block(module: nn.Module) -> bool:
    kind = type(module)
    layer = kind.__module__.startswith("torch.nn.") or next(module.children(), None) is None
    stage = kind.__name__.endswith("Stage") and any(isinstance(part, _CONTAINERS) for part in module.modules())
    return not (layer or stage or isinstance(module, _CONTAINERS)) and next(module.parameters(), None) is not None
