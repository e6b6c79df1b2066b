"""Loggers against what other readers see: csv, TensorBoard's EventAccumulator."""

import csv
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fabric_trainer.config import Config, LoggersConfig
from fabric_trainer.csv_logger import CsvLogger
from fabric_trainer.history import History, read_history
from fabric_trainer.loggers import Loggers
from fabric_trainer.tensorboard_logger import TensorBoardLogger


def rows(first: int, last: int, session: int = 0) -> list[dict[str, float]]:
    """Updates ``first`` to ``last``; the loss tells the step and the session apart."""
    return [
        {"step": s, "epoch": s // 4, "train/loss": s + session / 8, "grad_norm": 1 / s} for s in range(first, last + 1)
    ]


def read(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def scalars(folder: Path, tag: str, purge: bool = True) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=purge)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# ---- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_rows_read_back_exactly(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.log_updates(rows(1, 3))
    logger.log_metrics(3, {"val/loss": 1.0})
    logger.log_updates(rows(4, 7))
    logger.close()
    assert read(tmp_path / "metrics.csv") == rows(1, 7)
    header, first = (tmp_path / "metrics.csv").read_text().splitlines()[:2]
    assert header == "step,epoch,train/loss,grad_norm"
    assert first == "1,0,1.0,1.0"  # ints stay ints


@given(value=st.floats())
def test_csv_floats_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    logger = CsvLogger(path)
    logger.log_updates([{"step": 1, "train/loss": value}])
    logger.close()
    (row,) = read(path)
    assert row["train/loss"] == value or (math.isnan(value) and math.isnan(row["train/loss"]))
    assert math.copysign(1, row["train/loss"]) == math.copysign(1, value) or math.isnan(value)


def test_csv_names_with_commas_and_quotes(tmp_path: Path) -> None:
    name = 'train/"a", b'
    for session, step in enumerate((1, 2)):
        logger = CsvLogger(tmp_path / "metrics.csv")
        if session:
            logger.cut_back(1)
        logger.log_updates([{"step": step, name: 0.5}])
        logger.close()
    assert read(tmp_path / "metrics.csv") == [{"step": 1, name: 0.5}, {"step": 2, name: 0.5}]


def test_csv_refuses_other_keys_and_names_them(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.log_updates(rows(1, 2))
    with pytest.raises(ValueError, match=r"lacks \['epoch', 'grad_norm'\] and adds \['val/loss'\]"):
        logger.log_updates([{"step": 3, "train/loss": 0.0, "val/loss": 0.0}])
    logger.close()
    assert read(tmp_path / "metrics.csv") == rows(1, 2)


@pytest.mark.parametrize("cut", [0, 1, 5, 9, 100])
@pytest.mark.parametrize("torn", [0, 1, 3, 12])
def test_csv_kill_and_resume_gives_each_step_once(tmp_path: Path, cut: int, torn: int) -> None:
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path)
    logger.log_updates(rows(1, 9))  # killed: never closed
    if torn:
        path.write_bytes(path.read_bytes()[:-torn])
    whole = path.read_text().count("\n") - 1
    resumed = CsvLogger(path)
    resumed.cut_back(cut)
    kept = min(cut, whole)
    assert read(path) == rows(1, kept)
    resumed.log_updates(rows(cut + 1, cut + 3, session=1))
    resumed.close()
    assert read(path) == rows(1, kept) + rows(cut + 1, cut + 3, session=1)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]  # no temporary left


def test_csv_survives_a_kill_in_its_header(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epo")
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.cut_back(0)
    logger.log_updates(rows(1, 2))
    logger.close()
    assert read(tmp_path / "metrics.csv") == rows(1, 2)


def test_csv_of_a_resume_that_logs_more(tmp_path: Path) -> None:
    for step, extra in ((1, {}), (2, {"ema/decay": 0.5})):
        logger = CsvLogger(tmp_path / "metrics.csv")
        logger.cut_back(step - 1)
        logger.log_updates([{"step": step, "train/loss": 1.0, **extra}])
        logger.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss,ema/decay\n1,1.0,\n2,1.0,0.5\n"


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_update_and_metric(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_updates(rows(1, 6))
    logger.log_metrics(6, {"val/nrmse": 0.25})
    logger.close()
    assert scalars(tmp_path, "train/loss") == [(s, float(s)) for s in range(1, 7)]
    assert scalars(tmp_path, "val/nrmse") == [(6, 0.25)]


@pytest.mark.parametrize("purge", [True, False])  # readers that heed the restart marker, and those that don't
def test_tensorboard_kills_and_resumes_give_each_step_once(tmp_path: Path, purge: bool) -> None:
    def session(number: int, first: int, last: int) -> None:
        logger = TensorBoardLogger(tmp_path)
        if number:
            logger.cut_back(first - 1)
        logger.log_updates(rows(first, last, number))
        logger.log_metrics(last, {"val/loss": last + number / 8})
        logger.flush()  # and killed
        (file,) = set(tmp_path.iterdir()) - seen
        # a clock set back, or a smaller process id within a second: readers meet the newest file first
        seen.add(file.rename(tmp_path / f"events.out.tfevents.{9 - number}"))

    seen: set[Path] = set()
    session(0, 1, 10)
    torn = tmp_path / "events.out.tfevents.9"
    torn.write_bytes(torn.read_bytes()[:-7])
    session(1, 6, 12)
    session(2, 9, 15)
    expected = {s: s + (s > 5) / 8 + (s > 8) / 8 for s in range(1, 16)}
    seen_losses = scalars(tmp_path, "train/loss", purge)
    assert len(seen_losses) == 15
    assert dict(seen_losses) == expected
    assert scalars(tmp_path, "val/loss", purge) == [(15, 15.25)]


def test_tensorboard_reader_that_is_already_open_forgets_too(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_updates(rows(1, 10))
    logger.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    assert len(events.Scalars("train/loss")) == 10
    (first,) = tmp_path.iterdir()
    resumed = TensorBoardLogger(tmp_path)
    resumed.cut_back(4)
    resumed.log_updates(rows(5, 7, session=1))
    resumed.flush()
    (second,) = set(tmp_path.iterdir()) - {first}
    second.rename(tmp_path / "events.out.tfevents.99999999999")  # as if a second had passed
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        *((s, float(s)) for s in range(1, 5)),
        *((s, s + 0.125) for s in range(5, 8)),
    ]


# ---- together -------------------------------------------------------------------------------------------------------


def test_loggers_are_those_of_the_configuration(tmp_path: Path) -> None:
    loggers = Loggers.build(tmp_path, Config(), "run")
    loggers.log_updates(rows(1, 4))
    loggers.log_metrics(4, {"val/loss": 0.5})
    loggers.flush()
    loggers.close()
    assert read(tmp_path / "metrics.csv") == rows(1, 4)
    assert len(scalars(tmp_path / "tensorboard", "grad_norm")) == 4
    resumed = Loggers.build(tmp_path, Config(), "run")
    resumed.cut_back(2)
    resumed.log_updates(rows(3, 4, session=1))
    resumed.close()
    assert read(tmp_path / "metrics.csv") == rows(1, 2) + rows(3, 4, session=1)
    assert len(scalars(tmp_path / "tensorboard", "grad_norm")) == 4
    none = Loggers.build(tmp_path / "absent", Config(loggers=LoggersConfig(csv=False, tensorboard=False)), "run")
    assert none.loggers == []
    none.log_updates(rows(1, 1))


def test_history_round_trip_and_cut_back(tmp_path: Path) -> None:
    history = History()
    history.add_evaluation({"step": 4, "epoch": 0, "window": 5, "val/loss": math.inf, "val/nrmse": 0.1})
    history.add_epoch({"epoch": 0, "step": 4, "train_epoch/loss": math.nan})
    state = history.state_dict()
    history.add_evaluation({"step": 8, "val/loss": -math.inf})
    history.write(tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    written = json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    assert written["evaluations"][0]["val/loss"] == "Infinity"
    back = read_history(tmp_path)
    assert back.evaluations == history.evaluations
    assert isinstance(back.evaluations[0]["step"], int)
    assert math.isnan(back.epochs[0]["train_epoch/loss"])

    history.load_state_dict(state)
    assert [e["step"] for e in history.evaluations] == [4]
    state["evaluations"][0]["step"] = 99  # the copy is deep
    assert history.evaluations[0]["step"] == 4


def test_history_of_something_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text("[]")
    with pytest.raises(ValueError, match="evaluations"):
        read_history(tmp_path)
