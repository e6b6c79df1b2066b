"""What a confusion matrix says, as numbers and as pictures for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fabric_trainer.window import to_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from models.vision.task import ImageClassification

MOST = 100  # classes with metrics of their own
NAMED, COUNTED = 60, 25  # classes with names at the axes, and with numbers in the cells
ROWS, COLUMNS = 3, 6  # of the worst mistakes
BATCH = 256


def figures(sums: dict[str, Any], classes: list[str]) -> dict[str, float]:
    """The metrics of a split, from its sums: ``loss``, ``acc``, ``top5``, ``weight`` and ``confusion``, whose rows are
    the true classes: float64 (C, C). A class that never occurs (or is never guessed) has no recall (precision)."""
    weight, confusion = sums["weight"], sums["confusion"]
    right, occurs, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    recall = {name: right[i] / occurs[i] for i, name in enumerate(classes) if occurs[i]}
    precision = {name: right[i] / guessed[i] for i, name in enumerate(classes) if guessed[i]}
    found = {"loss": sums["loss"] / weight, "balanced_acc": float(np.mean(list(recall.values())))}
    if len(confusion) > 5:
        found["top5"] = sums["top5"] / weight
    if len(classes) <= MOST:
        found |= {f"recall/{name}": float(value) for name, value in recall.items()}
        found |= {f"precision/{name}": float(value) for name, value in precision.items()}
    return found | {"acc": sums["acc"] / weight}


@torch.no_grad()
def draw(task: ImageClassification, network: nn.Module, device: torch.device) -> dict[str, Figure]:
    """Of the test split, else of val: title -> figure. network: in eval mode, on ``device``."""
    split = next((name for name in ("test", "val") if task.dataset(name) is not None), None)
    if split is None:
        return {}
    samples = task.dataset(split)
    assert samples is not None
    guesses, probabilities = [], []
    for places, labels in zip(samples.places.split(BATCH), samples.labels.split(BATCH), strict=True):
        batch = task.preprocess({"place": places, "label": labels})
        probability, guess = task.logits(network, to_device(batch, device)).softmax(1).max(1)
        guesses.append(guess.cpu())
        probabilities.append(probability.cpu())
    guess, probability = torch.cat(guesses), torch.cat(probabilities)
    count = len(task.classes)
    known = guess < count  # an output too many may have won
    confusion = np.zeros((count, count))
    np.add.at(confusion, (samples.labels[known].numpy(), guess[known].numpy()), 1)
    drawn = {f"Confusion matrix, {split} split": confusion_figure(confusion, task.classes)}
    wrong = (guess != samples.labels) & known
    if wrong.any():
        worst = (probability * wrong).argsort(descending=True)[: min(ROWS * COLUMNS, int(wrong.sum()))]
        drawn[f"Surest mistakes, {split} split"] = mistakes_figure(task, samples.places, guess, probability, worst)
    return drawn


def confusion_figure(confusion: np.ndarray, classes: list[str]) -> Figure:
    """Rows are the true classes; the colour is the share of the row, the number the count: (C, C)."""
    from matplotlib.figure import Figure

    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = float(np.clip(0.5 * len(classes) + 2, 4.5, 11))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= NAMED:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= COUNTED:
        for row, column in np.argwhere(confusion > 0):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{confusion[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def mistakes_figure(
    task: ImageClassification, places: Tensor, guess: Tensor, probability: Tensor, worst: Tensor
) -> Figure:
    """The pictures at ``worst``, which are rows of the split, with what they show and what was seen in them."""
    from matplotlib.figure import Figure

    assert task.album is not None
    rows = -(-len(worst) // COLUMNS)
    figure = Figure(figsize=(1.7 * COLUMNS, 2.1 * rows), layout="constrained")
    for axes in figure.subplots(rows, COLUMNS, squeeze=False).flat:
        axes.axis("off")
    for axes, row in zip(figure.axes, worst.tolist(), strict=False):
        place = int(places[row])
        truth = task.classes[int(task.album.labels[place])]
        axes.imshow(task.album.picture(place, 256))
        seen = f"{task.classes[int(guess[row])]} {probability[row]:.2f}"
        axes.set_title(f"{truth}\nseen: {seen}", fontsize=8)
    return figure
