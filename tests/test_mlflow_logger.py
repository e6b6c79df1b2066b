"""What a run leaves in a local MLflow store, read back with MLflow's own client."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric
from toys import Regression, config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.config import Config, LoggersConfig, MlflowConfig, flatten
from fabric_trainer.errors import InputError
from fabric_trainer.history import read_history
from fabric_trainer.loggers import Loggers
from fabric_trainer.mlflow_logger import MlflowLogger
from fabric_trainer.state import State

LAST = 22


class Ends:
    def on_update_end(self, state: State, metrics: dict[str, float]) -> None:
        if state.counters.step == 13:
            raise ConnectionError


@dataclass
class Run:
    folder: Path
    client: Any
    id: str
    after_the_error: Any
    config: Config

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, as they lie in the store."""
        return [(point.step, point.value) for point in self.client.get_metric_history(self.id, name)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ended by an error in update 14, and continued from the checkpoint of update 8."""
    pytest.importorskip("mlflow")
    root = tmp_path_factory.mktemp("runs")
    made = config(
        **{
            "run.root": str(root),
            "run.max_epochs": None,
            "run.max_steps": LAST,
            "run.log_every_n_steps": 4,
            "evaluate.every": "3 steps",
            "checkpoint.every": "4 steps",
            "checkpoint.keep_every": "8 steps",
            "checkpoint.monitor": "val/loss",
            "optim.name": "sgd",
            "optim.lr": 0.1,
            "loggers.tensorboard": False,
            "loggers.mlflow": MlflowConfig(experiment="toys", tags={"size": "small"}),
        }
    )
    folder = root / "some"
    with pytest.raises(ConnectionError):
        fit(Fabric(accelerator="cpu", devices=1, callbacks=[Ends()]), Regression(), made, folder)
    from mlflow import MlflowClient

    note = json.loads((folder / "mlflow.json").read_text())
    assert note["tracking_uri"] == f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=note["tracking_uri"])
    after = client.get_run(note["run_id"])
    saved = load(folder / "checkpoints" / "step-00000008.pt")
    fit(Fabric(accelerator="cpu", devices=1), Regression(), made, folder, saved)
    return Run(folder, client, note["run_id"], after, made)


def test_one_run_of_the_experiment_with_the_configuration(run: Run) -> None:
    (found,) = run.client.search_runs([run.client.get_experiment_by_name("toys").experiment_id])
    assert (found.info.run_id, found.info.run_name) == (run.id, "some")
    assert found.data.tags["size"] == "small"
    assert (run.after_the_error.info.status, found.info.status) == ("FAILED", "FINISHED")
    from dataclasses import asdict

    assert found.data.params == {name: str(value) for name, value in flatten(asdict(run.config)).items()}
    assert found.data.params["optim.lr"] == "0.1" and len(found.data.params) > 100


def test_every_point_is_there_once_and_at_its_step(run: Run) -> None:
    with (run.folder / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    logged = sorted({*range(3, LAST, 3), *range(4, LAST, 4), 13, LAST})  # evaluations, log points, the epoch's end
    for name in ("train/loss", "grad_norm", "lr/all", "samples", "epoch"):
        assert run.points(name) == [(step, float(rows[step][name])) for step in logged], name
    assert [step for step, _ in run.points("samples_per_second")] == logged
    history = read_history(run.folder)
    evaluations = [(e["step"], e["val/loss"]) for e in history.evaluations]
    assert run.points("val/loss") == evaluations and len(evaluations) == 8
    assert run.points("train_epoch/loss") == [(e["step"], e["train_epoch/loss"]) for e in history.epochs]


def test_the_best_so_far_is_a_metric(run: Run) -> None:
    best: list[tuple[int, float]] = []
    for entry in read_history(run.folder).evaluations:
        if not best or entry["val/loss"] < best[-1][1]:
            best.append((entry["step"], entry["val/loss"]))
    assert run.points("best/val/loss") == best and len(best) > 1


def test_a_stop_and_other_names_and_values(run: Run, tmp_path: Path) -> None:
    keys = MlflowConfig(tracking_uri=f"sqlite:///{run.folder.parent / 'mlflow.db'}", run_name="other")
    logger = MlflowLogger(tmp_path, keys, "some", Config())
    names = {f"grad_norm/{i}": float(i) for i in range(1200)}  # more than a server takes at once
    logger.log_updates([{"step": 1, "lr/head.*": 0.5, "train/loss": math.nan, **names}])
    logger.close(75)
    found = run.client.get_run(logger.id)
    assert (found.info.status, found.info.run_name) == ("KILLED", "other")
    assert run.client.get_experiment(found.info.experiment_id).name == "Default"
    assert {name: found.data.metrics[name] for name in names} == names
    assert found.data.metrics["lr/head._"] == 0.5 and math.isnan(found.data.metrics["train/loss"])


def test_what_can_t_be_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    made = Config(loggers=LoggersConfig(mlflow=MlflowConfig(tracking_uri=str(tmp_path / "mlruns"))))
    with pytest.raises(InputError, match=r"loggers\.mlflow\.tracking_uri: .*mlruns: The filesystem tracking backend"):
        Loggers.build(tmp_path, made, "run")
    made.loggers.mlflow = MlflowConfig(tracking_uri=f"sqlite:///{tmp_path / 'new.db'}")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.delitem(sys.modules, "mlflow.store.tracking.sqlalchemy_store", raising=False)
    with pytest.raises(InputError, match=r"needs the package sqlalchemy: pip install 'fabric-trainer\[mlflow\]'"):
        Loggers.build(tmp_path, made, "run")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"needs the package mlflow: pip install 'fabric-trainer\[mlflow\]'"):
        Loggers.build(tmp_path, made, "run")
    assert not (tmp_path / "mlflow.json").exists() and not (tmp_path / "metrics.csv").exists()


def test_a_run_that_the_store_has_lost(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))
    keys = MlflowConfig(tracking_uri=f"sqlite:///{run.folder.parent / 'mlflow.db'}")
    with pytest.raises(InputError, match=r"mlflow\.db: Run with id=0{32} not found"):
        MlflowLogger(tmp_path, keys, "some", Config())
