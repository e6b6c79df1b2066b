"""What a recipe brings: a network, data, a loss, metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from fabric_trainer.config import DataConfig
from fabric_trainer.order import Plan, Shuffled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import Metric

Batch = dict[str, Any]
"""What ``collate`` made of the samples, and three keys that the library adds:

``index``   int64 (B,), the samples' places in the dataset
``weight``  float32 (B,), 1 for a sample and 0 for a row that only pads; a dataset's own ``weight`` is kept, times that
``random``  :class:`fabric_trainer.random.SampleRandom`, random numbers that belong to the samples
"""


class Loss(NamedTuple):
    """A micro-batch's loss as *sums* over whatever ``Task.weight`` counts.

    total: 0-d tensor with a graph; the loop divides it by the weight of the whole update, over all ranks.
    logs: further 0-d sums to log beside it, as ``train/<name>``; detached by the loop.
    """

    total: Tensor
    logs: Mapping[str, Tensor] = {}


class Task:
    """A training recipe. ``network``, ``dataset`` and ``loss`` are the ones to write; the rest has defaults.

    The loop never scales a loss by batch size, ranks or accumulation: ``loss`` returns a sum, ``weight`` says over
    how much, and the update's gradient is the sum over all micro-batches and ranks divided by the total weight.
    """

    data_config = DataConfig()
    """The configuration's ``data`` section; the command line sets it before ``prepare``."""

    # ---- data -------------------------------------------------------------------------------------------------

    def prepare(self, root: Path) -> None:
        """Make, fetch or verify data under ``root``. Runs on rank 0 first, then on the others; must be repeatable."""

    def missing(self, root: Path) -> list[str]:
        """What would stop a real run here: one line each. Reads only; ``--dry_run`` prints it."""
        return []

    def dataset(self, split: str) -> Dataset[Any] | None:
        """The samples of ``train``, ``val``, ``test``, …, or None where there is no such split.

        Map-style, with a length. A sample is a dict of tensors, arrays or numbers. A dataset may define
        ``__getitems__(indices: list[int])`` and return one ready batch (a dict) for speed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define dataset(split)")

    def plan(self, dataset: Dataset[Any], seed: int) -> Plan:
        """The order of the training samples in each epoch. Default: all of them, shuffled by (seed, epoch)."""
        return Shuffled(len(dataset), seed)  # type: ignore[arg-type]

    def collate(self, samples: list[Any]) -> Batch:
        """One batch of a list of samples; runs in the loader's worker."""
        return default_collate(samples)

    def augment(self, batch: Batch) -> Batch:
        """Change a training batch on the host, in the loader's worker. Draw from ``batch['random']`` alone: then
        neither workers, nor ranks, nor a resume change what a sample becomes."""
        return batch

    def preprocess(self, batch: Batch) -> Batch:
        """``augment``'s counterpart for a batch that is evaluated or predicted: nothing random."""
        return batch

    # ---- training ---------------------------------------------------------------------------------------------

    def network(self) -> nn.Module:
        """The bare network, on the CPU; built right after the seed was set."""
        raise NotImplementedError(f"{type(self).__name__} must define network()")

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        """The repeated parts, such as a transformer's layers, inner ones first: what is sharded one at a time. Without
        any the whole network is gathered at once, which saves no memory in the forward."""
        return []

    def units(self, network: nn.Module) -> Sequence[str] | Mapping[str, Sequence[str]]:
        """What ``freeze.strategy`` freezes where ``freeze.units`` names nothing: patterns, in the order of unfreezing,
        such as ["backbone.layer4", "backbone.layer3"]. What is in none, such as the head, always trains."""
        return []

    def weight(self, batch: Batch) -> Tensor | float:
        """How much this batch counts in the loss's denominator, on the host. Default: samples, padding left out.

        For a loss per token return the number of valid tokens (of rows that are no padding).
        """
        return batch["weight"].sum()

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """The sum of the loss over the batch, on the device. Rows of weight 0 must add exactly nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(network, batch)")

    def training_figures(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of an update as ``train/…``, and of an epoch as ``train_epoch/…``, from the exact means of
        the loss (``loss``, which has to stay) and its logs: a ratio of two of them, such as an error relative to what
        it is an error of, is made here. Default: the means."""
        return means

    def describe(self) -> dict[str, str]:
        """Further lines of the start-up summary, by label: what a reader of the run has to know of this recipe."""
        return {}

    # ---- evaluation -------------------------------------------------------------------------------------------

    def meters(self) -> dict[str, Metric]:
        """torchmetrics to feed in ``evaluate``: name -> fresh metric. Most tasks need none: see ``figures``."""
        return {}

    def evaluate(self, network: nn.Module, batch: Batch, meters: dict[str, Metric]) -> dict[str, Tensor]:
        """Sums of one evaluation batch; the library adds them up in float64 over all batches and ranks. Most are 0-d;
        one with a shape, such as a confusion matrix, has the same shape in every batch.

        Default: the training loss and its logs, and the weight they are sums over.
        """
        loss = self.loss(network, batch)
        weight = torch.as_tensor(self.weight(batch))
        return {"loss": loss.total, **loss.logs, "weight": weight}

    def figures(self, sums: dict[str, Any]) -> dict[str, float]:
        """The metrics of a whole split, from its exact sums: floats, and float64 arrays of those with a shape. A name
        with a slash, such as ``recall/cat``, is logged and not printed. Default: each sum divided by the weight."""
        weight = sums["weight"]
        return {name: value / weight for name, value in sums.items() if name != "weight"}

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor | list[str]]:
        """What ``--predict`` writes, by name: a row per sample of the batch, as tensors (B, ...) or lists of B strings.
        Rows that only pad are left out."""
        raise NotImplementedError(f"{type(self).__name__} must define predict(network, batch)")

    def pictures(self, network: nn.Module, device: torch.device) -> dict[str, Figure]:
        """Figures for the report, by title; called once, on rank 0, at the end, with the best weights."""
        return {}
