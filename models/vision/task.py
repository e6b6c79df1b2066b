"""The vision system's task: image classification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from data.vision import mix
from data.vision.album import Album
from data.vision.augment import MEAN, STD, cutout, erased, flipped, normalised, shifted
from data.vision.pictures import missing, read
from data.vision.transforms import MARGIN, EvalTransform, TrainTransform, seeds
from fabric_trainer.errors import InputError
from fabric_trainer.random import SampleRandom
from fabric_trainer.task import Batch, Loss, Task
from models.vision import networks
from models.vision.figures import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import Metric

FOLDER_SIZE = 224  # pixels, where the set has no size of its own
BATCHED = ("none", "default")  # policies that need no picture of their own size
Settings = Mapping[str, Any]


class Places(Dataset[dict[str, Tensor]]):
    """The samples of one split: their places in the album and their labels; the pixels come later."""

    def __init__(self, album: Album, split: str) -> None:
        self.places = album.places(split)
        self.labels = album.labels[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"place": self.places[index], "label": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        return {"place": self.places[rows], "label": self.labels[rows]}


class ImageClassification(Task):
    """Tell which of its classes a picture shows.

    dataset: cifar10, cifar100, mnist, fashionmnist or folder, under ``data.root`` (docs/vision.md has the layouts);
    ``data.val_split`` holds out a share of the training pictures, the same one for a ``split_seed`` whatever the run's
    seed. corrupt_limit: picture files that may be left out because they can't be decoded.

    model: fast (ours), one of the 28 torchvision names, any other name of timm's. pretrained: true for the library's
    own weights, whose normalisation the pictures then get, or a file's path. num_classes: outputs; else as many as
    there are classes. image_size: pixels of a side; else the set's own, 224 for a folder. drop_path: stochastic depth.
    stem: cifar begins a torchvision resnet with a 3x3 convolution of stride 1 and no pooling. model_args: further ones
    of the library's builder. channels_last: memory format of the network and its input.

    transforms: of training pictures (``TrainTransform``); an evaluation never sees any. flip: mirror half of them; else
    unless the set is mnist. padding: pixels by which pictures are shifted at most; else an eighth of the size,
    where ``transforms`` does anything and has not cropped already. cutout: pixels of a square that is left blank.
    random_erasing: the share of pictures with a blank rectangle. mixup, cutmix: alpha of the Beta distribution that a
    picture is mixed by with any other of the training set; 0 for never; both: either, for half of the pictures each.
    label_smoothing: of the training loss.

    resident: all pictures lie on the device at ``image_size``, and are cropped and flipped there as a batch: for sets
    that fit, and transforms none or default.
    """

    def __init__(
        self,
        *,
        dataset: Literal["cifar10", "cifar100", "mnist", "fashionmnist", "folder"] = "cifar10",
        split_seed: int = 0,
        corrupt_limit: int = 10,
        model: str = "fast",
        pretrained: bool | str = False,
        num_classes: int | None = None,
        image_size: int | None = None,
        drop_path: float = 0.0,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        model_args: Settings | None = None,
        channels_last: bool = False,
        transforms: Literal["none", "default", "strong", "autoaugment", "randaugment"] = "default",
        flip: bool | None = None,
        padding: int | None = None,
        cutout: int = 0,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        resident: bool = False,
    ) -> None:
        if resident and transforms not in BATCHED:
            raise ValueError(f"resident pictures are changed as a batch: transforms none or default, not {transforms}")
        for name, share in (("random_erasing", random_erasing), ("label_smoothing", label_smoothing)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be at least 0 and at most 1, not {share}")
        least = {"padding": padding or 0, "cutout": cutout, "mixup": mixup, "cutmix": cutmix}
        least |= {"corrupt_limit": corrupt_limit, "split_seed": split_seed}
        for name, value in least.items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        self.name, self.split_seed, self.corrupt_limit = dataset, split_seed, corrupt_limit
        self.model, self.pretrained, self.outputs, self.image_size = model, pretrained, num_classes, image_size
        self.building: dict[str, Any] = {"drop_path": drop_path, "stem": stem, "args": model_args or {}}
        self.channels_last, self.policy, self.resident = channels_last, transforms, resident
        self.flip = dataset != "mnist" and transforms != "none" if flip is None else flip
        self.padding, self.cutout, self.erasing = padding, cutout, random_erasing
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, label_smoothing
        self.album: Album | None = None
        self.stack: Tensor | None = None

    # ---- data -------------------------------------------------------------------------------------------------

    def prepare(self, root: Path) -> None:
        """Find, check and, where they are held in memory, read the pictures. InputError where something is missing."""
        data = self.data_config
        sets = read(
            self.name,
            root,
            download=data.download,
            val_split=data.val_split,
            split_seed=self.split_seed,
            corrupt_limit=self.corrupt_limit,
            tell=_tell,
        )
        self.classes, self.album = sets.classes, Album(sets)
        if self.outputs is None:
            self.outputs = len(self.classes)
        elif self.outputs < len(self.classes):
            raise InputError(
                f"task.args.num_classes: {self.outputs} are fewer than the {len(self.classes)} of the data"
            )
        size = self.size = self.image_size or self.album.size or FOLDER_SIZE
        whole = self.album.size is not None  # pictures of one size, to be shifted rather than cropped
        self.eval_transform = EvalTransform(size, whole)
        self.train_transform = TrainTransform(size, self.policy, self.name, whole)
        if self.album.size == size:
            self.stack = self.album.pixels()
        elif self.resident:
            self.stack = self.album.stacked(self.eval_transform, round(size / MARGIN))
        if self.padding is None:
            self.padding = size // 8 if self.policy != "none" and (whole or self.resident) else 0
        if not self.padding < size:
            raise InputError(f"task.args.padding: {self.padding} must be less than the pictures' {size} pixels")
        self.colours = MEAN[self.name], STD[self.name]
        if self.pretrained is True:
            self.network()  # fetched by one process, for all
            self.colours = networks.colours(self.model)

    def missing(self, root: Path) -> list[str]:
        data = self.data_config
        found = missing(self.name, root, download=data.download, val_split=data.val_split)
        if isinstance(self.pretrained, str) and not Path(self.pretrained).is_file():
            found.append(f"task.args.pretrained: {self.pretrained} is not there")
        return found

    def dataset(self, split: str) -> Places | None:
        album = self._album()
        return Places(album, split) if split in album.splits else None

    def _album(self) -> Album:
        if self.album is None:
            raise ValueError("ImageClassification.prepare(root) has to come first: it finds the pictures")
        return self.album

    def augment(self, batch: Batch) -> Batch:
        """The pictures, uint8 (B, 3, S, S), each changed by itself, and whom they are mixed with; the rest is done on
        the device, see ``_augmented``."""
        random = batch["random"]
        batch |= self._read(batch["place"], random)
        if self.mixup or self.cutmix:
            others = len(self._album().splits["train"])
            mixture = mix.drawn(random, others, self.size, self.size, self.mixup, self.cutmix)
            mixture |= self._read(mixture["partner"], mix.partners_random(random, mixture))
            batch["mix"] = mixture | {"label": self._album().labels[mixture["partner"]]}
        return batch

    def preprocess(self, batch: Batch) -> Batch:
        return batch | self._read(batch["place"], None)

    def _read(self, places: Tensor, random: SampleRandom | None) -> dict[str, Tensor]:
        """``pixels``, unless they lie on the device. random: None for an evaluation."""
        if self.resident:
            return {}
        if self.stack is not None and (random is None or self.policy in BATCHED):
            return {"pixels": self.stack[places]}
        album, size = self._album(), self.size
        if random is None:
            return {"pixels": torch.stack([self._evaluated(place) for place in places.tolist()])}
        drawn = zip(places.tolist(), seeds(random), strict=True)
        # a crop has at least half of the shorter side
        return {"pixels": torch.stack([self.train_transform(album.picture(i, 2 * size), seed) for i, seed in drawn])}

    def _evaluated(self, place: int) -> Tensor:
        return self.eval_transform(self._album().picture(place, round(self.size / MARGIN)))

    # ---- training ---------------------------------------------------------------------------------------------

    def network(self) -> nn.Module:
        if self.outputs is None:
            raise ValueError("ImageClassification.prepare(root) has to come first: it counts the classes")
        network = networks.build(
            self.model, self.outputs, image_size=self.size, pretrained=self.pretrained, tell=_tell, **self.building
        )
        return network.to(memory_format=torch.channels_last) if self.channels_last else network

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        return networks.blocks(network)

    def units(self, network: nn.Module) -> Mapping[str, Sequence[str]]:
        return networks.units(network)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        labels, weight = batch["label"], batch["weight"]
        pictures = self._augmented(batch, batch["place"], batch["random"])
        if "mix" not in batch:
            logits = network(self._laid_out(pictures))
            losses = cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        else:
            mixture = batch["mix"]
            partners = self._augmented(mixture, mixture["partner"], mix.partners_random(batch["random"], mixture))
            logits = network(self._laid_out(mix.mixed(pictures, partners, mixture)))
            losses = mix.soft_loss(logits, labels, mixture["label"], mixture["share"], self.smoothing)
        correct = (logits.argmax(1) == labels) * weight
        return Loss((losses * weight).sum(), {"acc": correct.sum()})

    def _augmented(self, batch: Mapping[str, Any], places: Tensor, random: SampleRandom) -> Tensor:
        """Of a training batch: float32 (B, 3, S, S), normalised."""
        pixels = self._pixels(batch, places)
        if self.padding:
            pixels = shifted(pixels, random, self.padding)
        if self.flip:
            pixels = flipped(pixels, random)
        pictures = normalised(pixels, *self.colours)
        if self.cutout:
            pictures = cutout(pictures, random, self.cutout)
        return erased(pictures, random, self.erasing) if self.erasing else pictures

    def _pixels(self, batch: Mapping[str, Any], places: Tensor) -> Tensor:
        """uint8 (B, 3, S, S), where ``places`` lie."""
        if not self.resident:
            return batch["pixels"]
        assert self.stack is not None
        if self.stack.device != places.device:
            self.stack = self.stack.to(places.device)
        return self.stack[places]

    def _laid_out(self, pictures: Tensor) -> Tensor:
        return pictures.contiguous(memory_format=torch.channels_last) if self.channels_last else pictures

    # ---- evaluation -------------------------------------------------------------------------------------------

    def logits(self, network: nn.Module, batch: Batch) -> Tensor:
        """Of pictures as they are: float32 (B, classes)."""
        pictures = normalised(self._pixels(batch, batch["place"]), *self.colours)
        return network(self._laid_out(pictures)).float()

    def evaluate(self, network: nn.Module, batch: Batch, meters: dict[str, Metric]) -> dict[str, Tensor]:
        """The loss without smoothing, who is right at once and within five, and the confusion matrix."""
        labels, weight, logits = batch["label"], batch["weight"], self.logits(network, batch)
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = (best == labels[:, None]).to(weight.dtype) * weight[:, None]
        # as a product of 0s and 1s: counting by index adds in any order, which a deterministic run refuses
        truth, guess = (nn.functional.one_hot(kind, logits.shape[1]).float() for kind in (labels, best[:, 0]))
        return {
            "loss": (cross_entropy(logits, labels, reduction="none") * weight).sum(),
            "acc": hits[:, 0].sum(),
            "top5": hits.sum(),
            "confusion": truth.T @ (guess * weight[:, None]),
            "weight": weight.sum(),
        }

    def figures(self, sums: dict[str, Any]) -> dict[str, float]:
        """``loss``, ``top5`` of more than five classes, ``balanced_acc`` (the mean recall of the classes there are),
        ``recall/<class>`` and ``precision/<class>`` of at most a hundred classes, ``acc``."""
        return figures(sums, self.classes)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor | list[str]]:
        """``class``, its ``probability``, and the picture's ``file``."""
        probability, best = self.logits(network, batch).softmax(1).max(1)
        names = [*self.classes, *(f"output {i}" for i in range(len(self.classes), self.outputs or 0))]
        files = [self._album().names[place] for place in batch["place"].tolist()]
        return {"class": [names[i] for i in best.tolist()], "probability": probability, "file": files}

    def pictures(self, network: nn.Module, device: torch.device) -> dict[str, Figure]:
        """The confusion matrix of the test split, else val's, and the pictures it is most wrong about."""
        from models.vision.figures import draw

        return draw(self, network, device)


_tell = rank_zero_only(print)
