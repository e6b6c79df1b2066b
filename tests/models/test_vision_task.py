"""Image classification on our loop: the same pictures however they come, exact metrics, and what a run leaves."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from lightning.fabric import Fabric
from PIL import Image
from small_pictures import write_cifar10, write_cifar100, write_fashionmnist, write_folder, write_mnist
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from fabric_trainer import cli, fit
from fabric_trainer.checkpoint import load
from fabric_trainer.command import parse
from fabric_trainer.random import SampleRandom
from models.vision.task import ImageClassification

BASE = {
    "task": {"path": "models.vision.task.ImageClassification", "args": {"model": "test_resnet"}},
    "data": {"val_split": 0.2},
    "batch": {"micro_batch_size": 16},
    "optim": {"name": "sgd", "lr": 0.05},
    "run": {"max_epochs": 2, "log_every_n_steps": 3},
    "checkpoint": {"monitor": "val/acc", "mode": "max"},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vision.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("cifar10"), train=110, test=45)


@pytest.fixture(scope="session")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), per_class=14, size=40)


def run(name: str, root: Path, *argv: str, **args: object) -> int:
    keys = [f"--task.args.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in args.items()]
    return cli.main(["--config", "vision.yaml", "--name", name, f"--data.root={root}", *keys, *argv])


FOLDER = {"dataset": "folder", "image_size": 32}


class Watched(ImageClassification):
    """Keeps what its network is given, and its losses."""

    seen: list[tuple[bool, Tensor]]
    losses: list[Tensor]

    def network(self) -> nn.Module:
        network, self.seen, self.losses = super().network(), [], []
        network.register_forward_pre_hook(lambda module, x: self.seen.append((module.training, x[0].clone())))
        return network

    def loss(self, network, batch):
        loss = super().loss(network, batch)
        self.losses.append(loss.total.detach())
        return loss


def trained(fabric: Fabric, root: Path, *argv: str, **args: object) -> tuple[Watched, dict[str, Tensor]]:
    """Two epochs that leave no files: the task and the final weights. A folder has a val split of its own."""
    split = "null" if "dataset" in args else "0.2"
    made = ("--config=vision.yaml", f"--data.val_split={split}", f"--task.path={__name__}.Watched", *argv)
    config = parse(made)[1]
    config.task.args |= args
    task = cli.make_task(config)
    task.prepare(root)
    state = fit(fabric, task, config)
    return task, state.module.state_dict()


WAYS = {
    "cifar": {"cutout": 8, "random_erasing": 0.5},
    "autoaugment and mixing": {"transforms": "autoaugment", "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1},
    "folder": FOLDER | {"transforms": "randaugment", "mixup": 0.2},
}


@pytest.mark.parametrize("args", WAYS.values(), ids=WAYS)
def test_the_number_of_workers_changes_no_bit_of_the_loss(home, fabric, cifar, fruit, args):
    root = fruit if "dataset" in args else cifar
    (here, a), (there, b) = (trained(fabric, root, f"--data.num_workers={n}", **args) for n in (0, 2))
    assert [float(x) for x in here.losses] == [float(x) for x in there.losses] and len(here.losses) >= 6
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("way", ["none", "default", "folder"])
def test_pictures_on_the_device_are_those_of_the_loader(home, fabric, cifar, fruit, way):
    args = FOLDER | {"transforms": "none"} if way == "folder" else {"transforms": way}
    root = fruit if way == "folder" else cifar
    loader, device = (trained(fabric, root, resident=resident, **args)[0].seen for resident in (False, True))
    assert len(loader) == len(device) and {training for training, _ in loader} == {True, False}
    for (training, a), (training_too, b) in zip(loader, device, strict=True):
        assert training == training_too and torch.equal(a, b)


def test_an_evaluation_sees_the_pictures_as_they_are(home, fabric, fruit):
    """The middle of the resized picture, normalised, in the order of the files."""
    seen = trained(fabric, fruit, transforms="strong", **FOLDER)[0].seen
    first = next(x for training, x in seen if not training)
    path = sorted((fruit / "val" / "apple").iterdir())[0]
    whole = F.resize(Image.open(path).convert("RGB"), [37])
    pixels = F.to_image(F.center_crop(whole, [32, 32])).float() / 255
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(first[0], (pixels - mean[:, None, None]) / std[:, None, None], atol=1e-5, rtol=0)


def test_mixing_is_exact_however_an_update_is_split(home, fabric, cifar):
    """test_vit has no batch statistics: two micro-batches of 16 are one of 32."""
    args = {"model": "test_vit", "image_size": 32} | WAYS["autoaugment and mixing"]
    weights = []
    for size, accumulate in ((32, 1), (16, 2)):
        batch = (f"--batch.micro_batch_size={size}", f"--batch.accumulate={accumulate}")
        weights.append(trained(fabric, cifar, *batch, "--run.max_epochs=1", **args)[1])
    a, b = weights
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a)
    assert not torch.equal(a["head.weight"], torch.zeros_like(a["head.weight"]))


def test_a_partner_looks_as_it_does_in_its_own_turn(cifar):
    task = ImageClassification(transforms="strong", mixup=1.0, cutmix=1.0)
    task.prepare(cifar)
    index = torch.arange(20)
    samples = task.dataset("train").__getitems__(index.tolist())
    batch = task.augment(samples | {"random": SampleRandom(3, 1, index)})
    partner = batch["mix"]["partner"]
    turn = task.dataset("train").__getitems__(partner.tolist())
    own = task.augment(turn | {"random": SampleRandom(3, 1, partner)})
    assert torch.equal(batch["mix"]["pixels"], own["pixels"]) and torch.equal(batch["mix"]["label"], own["label"])
    assert len(set(partner.tolist())) > 10


# ---- figures --------------------------------------------------------------------------------------------------------


def predicted(out: Path) -> tuple[list[str], list[str], list[float], list[str]]:
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "class", "probability", "file"]
    columns = ([row[key] for row in rows] for key in ("index", "class", "probability", "file"))
    index, names, probabilities, files = columns
    return index, names, [float(p) for p in probabilities], files


def expected(truth: list[str], guess: list[str], classes: list[str], prefix: str) -> dict[str, float]:
    """scikit-learn's."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_score, recall_score

    keys = {"labels": classes, "average": None, "zero_division": np.nan}
    each = {"recall": recall_score(truth, guess, **keys), "precision": precision_score(truth, guess, **keys)}
    found = {"acc": accuracy_score(truth, guess), "balanced_acc": balanced_accuracy_score(truth, guess)}
    for kind, values in each.items():
        found |= {f"{kind}/{name}": v for name, v in zip(classes, values, strict=True) if not np.isnan(v)}
    return {f"{prefix}/{name}": float(value) for name, value in found.items()}


def check_metrics(printed: dict[str, float], truth: list[str], guess: list[str], classes: list[str], prefix: str):
    wanted = expected(truth, guess, classes, prefix)
    loss = {f"{prefix}/loss", f"{prefix}/top5"} & set(printed)
    assert set(printed) - loss == set(wanted)
    assert {name: printed[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)


def printed_metrics(out: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split() for line in out.splitlines() if line[:4] == "val/")}


@pytest.mark.distributed
def test_metrics_are_those_of_scikit_learn(home, fruit, capsys):
    """42 pictures in batches of 16, by one process and by two: the last batches have 10 and 5."""
    assert run("a", fruit, "--data.val_split=null", "--run.max_epochs=1", **FOLDER) == 0
    capsys.readouterr()
    assert run("a", fruit, "--data.val_split=null", "--evaluate", "best", **FOLDER) == 0
    printed = printed_metrics(capsys.readouterr().out)
    keys = [f"--task.args.{name}={value}" for name, value in FOLDER.items()]
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config=vision.yaml", "--name=a", "--evaluate=best"]
    command += [f"--data.root={fruit}", "--data.val_split=null", "--fabric.devices=2", *keys]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    assert two.returncode == 0, two.stderr
    assert run("a", fruit, "--data.val_split=null", "--predict", "best", "--out", "p.csv", **FOLDER) == 0
    _, guess, probabilities, files = predicted(Path("p.csv"))
    truth = [Path(file).parts[1] for file in files]
    check_metrics(printed, truth, guess, ["apple", "pear", "plum"], "val")
    check_metrics(printed_metrics(two.stdout), truth, guess, ["apple", "pear", "plum"], "val")
    assert files == sorted(files) and all((fruit / file).is_file() for file in files)
    assert all(1 / 3 <= p <= 1 for p in probabilities)


def test_five_guesses_and_the_confusion_matrix(cifar):
    from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

    task = ImageClassification(model="test_resnet")
    task.prepare(cifar)
    network = task.network().eval()
    samples = task.dataset("test")
    batch = task.preprocess(samples.__getitems__(list(range(45)))) | {"weight": torch.ones(45)}
    batch["weight"][40:] = 0
    with torch.no_grad():
        sums, logits = task.evaluate(network, batch, {}), task.logits(network, batch).double().numpy()
    truth, guess = samples.labels[:40].numpy(), logits[:40].argmax(1)
    assert (sums["confusion"].numpy() == confusion_matrix(truth, guess, labels=range(10))).all()
    figures = task.figures(
        {name: value.double().numpy() if value.ndim else value.item() for name, value in sums.items()}
    )
    assert figures["top5"] == pytest.approx(top_k_accuracy_score(truth, logits[:40], k=5, labels=range(10)))
    odds = np.exp(logits[:40])
    assert figures["loss"] == pytest.approx(
        log_loss(truth, odds / odds.sum(1, keepdims=True), labels=range(10)), rel=1e-6
    )
    assert list(figures)[-1] == "acc"


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_what_a_run_prints_and_leaves(home, cifar, fruit, capsys):
    assert run("a", cifar) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("test/acc 0.") and not any(line.startswith("test/recall") for line in lines)
    history = json.loads(Path("runs/a/history.json").read_text())
    (tested,), best = history["tests"], max(e["val/acc"] for e in history["evaluations"])
    assert {"test/acc", "test/top5", "test/loss", "test/recall/frog"} <= set(tested)
    saved = load(Path("runs/a/checkpoints/best.pt"))
    assert {e["step"]: e["val/acc"] for e in history["evaluations"]}[saved["counters"]["step"]] == best
    with Path("runs/a/metrics.csv").open() as file:
        assert {"train/loss", "train/acc"} <= set(next(csv.reader(file)))
    pictures = [path.name for path in Path("runs/a/pictures").iterdir()]
    assert any("Confusion" in name for name in pictures) and any("mistakes" in name for name in pictures)
    assert "data:image/png" in Path("runs/a/report.html").read_text()
    assert run("b", fruit, "--data.val_split=null", **FOLDER) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("val/acc 0.") and "test/" not in out


@pytest.mark.parametrize("write", [write_mnist, write_fashionmnist, write_cifar100])
def test_every_published_set_trains(home, tmp_path, write, capsys):
    root, name = write(tmp_path / "data"), write.__name__.removeprefix("write_")
    split = "--data.val_split=0.5" if name == "cifar100" else "--data.val_split=0.2"
    assert run("a", root, "--fast_dev_run", split, dataset=name, model="resnet18", stem="cifar") == 0
    assert "test/acc 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, says",
    [
        ({"num_classes": 9}, "task.args.num_classes: 9 are fewer than the 10 of the data"),
        ({"resident": True, "transforms": "strong"}, "task.args: resident pictures are changed as a batch"),
        ({"label_smoothing": 1.5}, "task.args: label_smoothing must be at least 0 and at most 1, not 1.5"),
        ({"mixup": -0.5}, "task.args: mixup must be at least 0, not -0.5"),
        ({"dataset": "imagenet"}, "task.args.dataset"),
        ({"padding": 40}, "task.args.padding: 40"),
        ({"transforms": "none", "colour": 1}, "colour"),
    ],
)
def test_wrong_arguments_are_one_line(home, cifar, capsys, args, says):
    assert run("a", cifar, **args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error


def test_a_dry_run_names_what_is_missing(home, tmp_path, capsys):
    assert run("a", tmp_path / "nowhere", "--dry_run", pretrained="weights.pt") == 0
    out = capsys.readouterr().out
    assert "data.root: cifar10 is not there" in out and "task.args.pretrained: weights.pt is not there" in out


def test_pretrained_networks_get_pictures_as_their_weights_did(cifar, monkeypatch):
    """timm's inception-style networks were trained on (-1, 1); nothing is fetched here."""
    monkeypatch.setattr(ImageClassification, "network", lambda self: None)
    for model, mean, std in (("vit_base_patch16_224.augreg_in21k", 0.5, 0.5), ("resnet18", 0.485, 0.229)):
        task = ImageClassification(model=model, pretrained=True)
        task.prepare(cifar)
        assert (task.colours[0][0], task.colours[1][0]) == (mean, std)
