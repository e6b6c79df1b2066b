"""MLflow: the configuration as parameters, values at log points, evaluations."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric_trainer.config import Config, MlflowConfig, flatten
from fabric_trainer.errors import FAILED, FINISHED, InputError
from fabric_trainer.files import write_atomically
from fabric_trainer.loggers import Logger, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_METRICS, MOST_PARAMS = 1000, 100  # that a server takes at once
STATUS = {FINISHED: "FINISHED", FAILED: "FAILED"}  # any other code is that of a stop


class MlflowLogger(Logger):
    """An MLflow run, with the training step as its step.

    ``folder``/mlflow.json keeps the run's id. A resumed run is the same MLflow run: the store is asked for the last
    step of every metric, and gets nothing at or below it again, so that each point is there once, wherever the process
    was killed. Of updates it gets the last one of each log point: a store takes 0.2 ms for a value.
    """

    def __init__(self, folder: Path, config: MlflowConfig, run_name: str, run_config: Config) -> None:
        MlflowClient = _import_client()
        from mlflow.entities import Metric, Param

        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or f"sqlite:///{Path(run_config.run.root).absolute() / 'mlflow.db'}"
        self._metric, note = Metric, folder / "mlflow.json"
        with _input_errors(f"loggers.mlflow.tracking_uri: {uri}"):
            self._client = MlflowClient(tracking_uri=uri)
            if note.exists():
                self.id = json.loads(note.read_text())["run_id"]
                self._client.update_run(self.id, status="RUNNING")
            else:
                name = config.run_name or run_name
                run = self._client.create_run(self._experiment(config.experiment), run_name=name, tags=config.tags)
                self.id = run.info.run_id
                write_atomically(note, json.dumps({"run_id": self.id, "tracking_uri": uri}) + "\n")
                params = [Param(_name(k), str(v)) for k, v in flatten(asdict(run_config)).items()]
                for i in range(0, len(params), MOST_PARAMS):
                    self._client.log_batch(self.id, params=params[i : i + MOST_PARAMS])
            latest = self._client.get_run(self.id).data.to_proto().metrics
        self._sent = {metric.key: int(metric.step) for metric in latest}

    def log_updates(self, rows: Sequence[Row]) -> None:
        """The last one."""
        for row in rows[-1:]:
            self.log_metrics(int(row["step"]), {name: value for name, value in row.items() if name != "step"})

    def log_metrics(self, step: int, values: Row) -> None:
        """Those that the store doesn't have up to ``step``."""
        now, named = int(time.time() * 1000), {_name(name): value for name, value in values.items()}
        new = {name: value for name, value in named.items() if step > self._sent.get(name, -1)}
        metrics = [self._metric(name, float(value), now, step) for name, value in new.items()]
        for i in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[i : i + MOST_METRICS])
        self._sent |= dict.fromkeys(new, step)

    def log_best(self, evaluation: Row) -> None:
        """best/… of its metrics, at the step of the evaluation."""
        best: Mapping[str, Any] = {f"best/{name}": value for name, value in evaluation.items() if "/" in name}
        self.log_metrics(int(evaluation["step"]), best)

    def close(self, code: int = 0) -> None:
        self._client.set_terminated(self.id, STATUS.get(code, "KILLED"))

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)


def _name(name: str) -> str:
    """With the letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _import_client() -> Any:
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise InputError(f"loggers.mlflow needs the package mlflow: {INSTALL}") from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient


INSTALL = "pip install 'fabric-trainer[mlflow]', or set loggers.mlflow to null"


@contextmanager
def _input_errors(where: str) -> Iterator[None]:
    """The store's, at the start, in one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except ImportError as error:  # mlflow-skinny takes what speaks to a database as an extra
        raise InputError(f"{where} needs the package {error.name}: {INSTALL}") from None
    except MlflowException as error:
        raise InputError(f"{where}: {str(error).splitlines()[0]}") from None
