"""Weights & Biases: values, the best of them, histograms, the network's layers, checkpoints."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric_trainer.checkpoint import linked, read_index
from fabric_trainer.errors import InputError
from fabric_trainer.files import write_atomically
from fabric_trainer.histogram import histogram
from fabric_trainer.loggers import Logger, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fabric_trainer.config import WandbConfig
    from fabric_trainer.summary import Layer


class WandbLogger(Logger):
    """A W&B run, with the training step as its step.

    ``folder``/wandb.json keeps the run's id, the last step sent and the steps of the checkpoints sent. A resumed run is
    the same W&B run, and sends nothing of it again: what was sent can't be taken back. All is noted before it is sent,
    so that a kill between the two may lose a log point, but never doubles one.
    """

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        run_name: str,
        resolved_config: dict[str, Any],
        every: int = 1,
        layers: Sequence[Layer] = (),
    ) -> None:
        """every: updates between two histograms. layers: shown as the run's model."""
        self._wandb = _import_wandb()
        self.folder, self.config, self.every = folder, config, every
        self._note = _Note(folder / "wandb.json")
        self.id: str = self._note.id
        self._fence = self._note.step
        self._watched: tuple[int, nn.Module, dict[str, Any]] | None = None
        fresh = self._fence < 0
        self._run = self._wandb.init(
            id=self.id,
            resume="allow",
            dir=str(folder),
            config=resolved_config,
            project=config.project,
            entity=config.entity,
            name=config.name or run_name,
            group=config.group,
            tags=config.tags or None,
            notes=config.notes,
            mode="offline" if config.mode == "offline" else None,  # None leaves WANDB_MODE its say; else online
            settings=self._wandb.Settings(console="off"),  # a progress bar makes no readable log
        )
        if fresh and layers:
            self._run.summary["graph_0"] = self._graph(layers)

    # ---- values -------------------------------------------------------------------------------------------------

    def log_updates(self, rows: Sequence[Row]) -> None:
        """The rows that no earlier session sent; with the last one the histograms of its update, where they are due."""
        steps = [(int(row["step"]), {k: v for k, v in row.items() if k != "step"}) for row in rows]
        if self._watched is not None and steps and steps[-1][0] == self._watched[0]:
            _, network, histograms = self._watched
            steps[-1][1].update(histograms)
            if self.config.watch in ("parameters", "all"):
                steps[-1][1].update(self._histograms("parameters", dict(network.named_parameters())))
        self._send(steps)

    def log_metrics(self, step: int, values: Row) -> None:
        """The values, unless an earlier session got to ``step``."""
        self._send([(step, dict(values))])

    def log_best(self, evaluation: Row) -> None:
        """best/step and the metrics, in the run's summary."""
        best = {name: value for name, value in evaluation.items() if name == "step" or "/" in name}
        self._run.summary.update({f"best/{name}": value for name, value in best.items()})

    def _send(self, steps: list[tuple[int, dict[str, Any]]]) -> None:
        steps = [(step, values) for step, values in steps if step > self._fence]
        if not steps:
            return
        self._note.reached(steps[-1][0])
        for step, values in steps:
            self._run.log(values, step=step)

    # ---- the network --------------------------------------------------------------------------------------------

    def log_gradients(self, step: int, network: nn.Module) -> None:
        """Histograms of what the optimizer is about to see, every so many updates; sent with the update's row.

        The hooks of ``wandb.watch`` would see each micro-batch of one rank instead, and their histograms would be at
        the step that was sent last: rows go out many at a time.
        """
        if self.config.watch == "none" or step % self.every or step <= self._fence:
            return
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        wanted = self.config.watch in ("gradients", "all")
        self._watched = step, network, self._histograms("gradients", gradients) if wanted else {}

    def _histograms(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """By the names that ``wandb.watch`` gives them."""
        found = {f"{kind}/{name}": histogram(tensor) for name, tensor in tensors.items()}
        return {name: self._wandb.Histogram(np_histogram=made) for name, made in found.items() if made is not None}

    def _graph(self, layers: Sequence[Layer]) -> Any:
        """What W&B shows as the run's model."""
        graph = self._wandb.Graph("torch")
        for i, layer in enumerate(layers):
            shapes = [[name, list(shape)] for name, shape in layer.parameters.items()]
            sizes = [math.prod(shape) for shape in layer.parameters.values()]
            graph.add_node(id=i, name=layer.name, class_name=layer.kind, parameters=shapes, num_parameters=sizes)
        return graph

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def log_checkpoint(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Under ``log_checkpoints: all``, an artifact: the next version of ``model-<id>``, if its step has none."""
        if self.config.log_checkpoints == "all" and entry["step"] not in self._note.checkpoints:
            best = linked(path.parent, "best")
            self._log_artifact(path, entry, best is not None and best.resolve().name == path.name)

    def _log_best_checkpoint(self) -> None:
        """What best.pt is at the end of the run, or of this part of it, unless it was the last to be sent as that."""
        checkpoints = self.folder / "checkpoints"
        if best := linked(checkpoints, "best"):
            path = checkpoints / best.resolve().name
            entry = read_index(checkpoints)[path.name]
            if entry["step"] != self._note.best:
                self._log_artifact(path, entry, best=True)

    def _log_artifact(self, path: Path, entry: Mapping[str, Any], best: bool) -> None:
        """The file has a second name until it is uploaded, so that it can be rotated away."""
        step = entry["step"]
        self._note.sends_checkpoint(step, best)
        held = self._held / path.name
        held.parent.mkdir(parents=True, exist_ok=True)
        held.unlink(missing_ok=True)  # of the same step, from before a resume
        try:
            os.link(path, held)
        except OSError:  # not every file system can
            shutil.copyfile(path, held)
        metrics = {name: value for name, value in entry["metrics"].items() if math.isfinite(value)}
        metadata = {"step": step, "sha256": entry["sha256"], **metrics}
        artifact = self._wandb.Artifact(f"model-{self.id}", type="model", metadata=metadata)
        artifact.add_file(str(held), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}", *["best"] * best])

    @property
    def _held(self) -> Path:
        return self.folder / "wandb" / "checkpoints"

    def close(self, code: int = 0) -> None:
        if self.config.log_checkpoints != "none":
            self._log_best_checkpoint()
        offline = self._run.offline
        self._run.finish(code)
        if not offline and self._held.exists():  # all is uploaded; offline, wandb sync will read them
            shutil.rmtree(self._held)


class _Note:
    """wandb.json: what has been sent. Both the training thread and the one that writes checkpoints do."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._content: dict[str, Any] = {"id": secrets.token_hex(4), "step": -1, "checkpoints": [], "best": None}
        if path.exists():
            self._content |= json.loads(path.read_text())
        with self._writing():
            pass

    @property
    def id(self) -> str:
        return self._content["id"]  # type: ignore[no-any-return]

    @property
    def step(self) -> int:
        return self._content["step"]  # type: ignore[no-any-return]

    @property
    def checkpoints(self) -> list[int]:
        return self._content["checkpoints"]  # type: ignore[no-any-return]

    @property
    def best(self) -> int | None:
        return self._content["best"]  # type: ignore[no-any-return]

    def reached(self, step: int) -> None:
        """Values up to ``step`` are about to be sent."""
        if step > self.step:
            with self._writing() as content:
                content["step"] = step

    def sends_checkpoint(self, step: int, best: bool) -> None:
        """The checkpoint of ``step`` is about to be sent, as the best or not."""
        with self._writing() as content:
            content["checkpoints"] = sorted({*content["checkpoints"], step})
            content["best"] = step if best else content["best"]

    @contextmanager
    def _writing(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            yield self._content
            write_atomically(self._path, json.dumps(self._content) + "\n")


def _import_wandb() -> Any:
    try:
        import wandb

        wandb.init  # noqa: B018  (the folder "wandb" that runs leave behind imports as a package too, an empty one)
    except (ImportError, AttributeError):
        message = "loggers.wandb needs the package wandb: pip install wandb, or set loggers.wandb to null"
        raise InputError(message) from None
    return wandb
