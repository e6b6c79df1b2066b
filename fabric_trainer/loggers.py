"""Where the values of updates and evaluations go: metrics.csv, TensorBoard, Weights & Biases, MLflow. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fabric_trainer.config import Config
    from fabric_trainer.summary import Layer

Row = Mapping[str, float]


class Logger:
    """What a run says to its loggers. Each has a method for what it has a use for; all else goes by it."""

    def cut_back(self, step: int) -> None:
        """Forget everything after ``step``; once, on a resume, before anything is logged."""

    def log_gradients(self, step: int, network: nn.Module) -> None:
        """The gradients that lie in the bare network are those of the update which will be ``step``, unless it is left
        out: then another one will."""

    def log_updates(self, rows: Sequence[Row]) -> None:
        """One row per applied update, in order: "step", and names such as "epoch", "samples", "train/loss", "lr/decay",
        "grad_norm". All rows have the same keys. The network has the weights after the last one."""

    def log_metrics(self, step: int, values: Row) -> None:
        """Evaluation metrics and exact epoch means, after the update rows of that step."""

    def log_best(self, evaluation: Row) -> None:
        """The best evaluation so far by checkpoint.monitor: an entry of the history, "step" and metrics."""

    def log_checkpoint(self, path: Path, entry: Mapping[str, Any]) -> None:
        """A checkpoint that is complete on disk, and its entry in the index; from the thread that has written it."""

    def flush(self) -> None:
        """Put on disk what was logged: called before a checkpoint is saved, or a kill would leave a gap."""

    def close(self, code: int = 0) -> None:
        """Flush and let go of the files. code: what the process leaves with, as far as is known (``errors.py``)."""


class Loggers(Logger):
    """The active loggers, called as one."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = list(loggers)

    @classmethod
    def build(cls, folder: Path, config: Config, run_name: str, layers: Sequence[Layer] = ()) -> Loggers:
        """Those that ``config.loggers`` asks for, writing into the run's ``folder``, which must exist.

        layers: of the network, for those that show them. Raises InputError where the package of one is not installed.
        """
        wanted, loggers = config.loggers, cls()
        if wanted.mlflow is not None:  # the first two can be refused, so they come before anything is written
            from fabric_trainer.mlflow_logger import MlflowLogger

            loggers.loggers.append(MlflowLogger(folder, wanted.mlflow, run_name, config))
        if wanted.wandb is not None:
            from fabric_trainer.wandb_logger import WandbLogger

            every = config.run.log_every_n_steps
            loggers.loggers.append(WandbLogger(folder, wanted.wandb, run_name, asdict(config), every, layers))
        if wanted.csv:
            from fabric_trainer.csv_logger import CsvLogger

            loggers.loggers.append(CsvLogger(folder / "metrics.csv"))
        if wanted.tensorboard:
            from fabric_trainer.tensorboard_logger import TensorBoardLogger

            loggers.loggers.append(TensorBoardLogger(folder / "tensorboard"))
        return loggers

    def cut_back(self, step: int) -> None:
        for logger in self.loggers:
            logger.cut_back(step)

    def log_gradients(self, step: int, network: nn.Module) -> None:
        for logger in self.loggers:
            logger.log_gradients(step, network)

    def log_updates(self, rows: Sequence[Row]) -> None:
        for logger in self.loggers:
            logger.log_updates(rows)

    def log_metrics(self, step: int, values: Row) -> None:
        for logger in self.loggers:
            logger.log_metrics(step, values)

    def log_best(self, evaluation: Row) -> None:
        for logger in self.loggers:
            logger.log_best(evaluation)

    def log_checkpoint(self, path: Path, entry: Mapping[str, Any]) -> None:
        for logger in self.loggers:
            logger.log_checkpoint(path, entry)

    def flush(self) -> None:
        for logger in self.loggers:
            logger.flush()

    def close(self, code: int = 0) -> None:
        for logger in self.loggers:
            logger.close(code)
