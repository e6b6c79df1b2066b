"""Predictions are those of a plain forward, one row per sample, in every format."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import CONFIG, error, home, run  # noqa: F401 (home is a fixture)
from test_evaluate import rank
from torch import Tensor, nn
from toys import Points, Regression

from fabric_trainer.checkpoint import load
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split
from fabric_trainer.predict import check_output, join, predict, rows, write


class Kinds(Regression):
    """One of each kind of value."""

    def predict(self, network: nn.Module, batch: dict) -> dict:
        y = network(batch["x"])
        return {
            "field": y[:, :, None].expand(-1, 2, 3).bfloat16(),
            "first": y[:, :1],
            "sure": y[:, 0] > 0,
            "class": y.argmax(1),
            "wide": y[:, 1].double(),
            "file": [f'no "{i}", Ä' for i in batch["index"].tolist()],
        }


class Mute(Regression):
    predict = Regression.__base__.predict


class Answers(Regression):
    """Predicts what it is given."""

    def __init__(self, *answers: dict) -> None:
        super().__init__()
        self.answers = list(answers)

    def predict(self, network, batch):
        return self.answers.pop(0)


def forward(task: Regression, network: nn.Module, size: int = 4) -> Tensor:
    """A plain pass over the val split, by the same batches: others may round differently."""
    with torch.no_grad():
        return torch.cat([network.eval()(x) for x in task.dataset("val").x.split(size)])


def predicted(fabric, task: Regression) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    network = task.network().train()
    table = predict(fabric, task, network, Split(fabric, task, task.dataset("val"), 4))
    assert network.training and torch.is_grad_enabled()
    return table


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=40),
    micro=st.integers(1, 11),
    ranks=st.integers(1, 5),
)
def test_any_number_of_ranks_gives_every_sample_once_in_order(weights, micro, ranks):
    """Also those that the dataset itself gives no weight."""
    task, points = Regression(), Points(len(weights), 3, torch.tensor(weights))
    torch.manual_seed(0)
    network = task.network()
    splits = [Split(rank(number, ranks), task, points, micro).batches for number in range(ranks)]
    with torch.no_grad():
        table = join([rows(task, network, batch) for batches in zip(*splits, strict=True) for batch in batches])
        expected = network(points.x).numpy()
    assert table["index"].tolist() == list(range(len(weights)))
    np.testing.assert_allclose(table["y"], expected, rtol=1e-5, atol=1e-6)


def test_the_kinds_of_values(fabric):
    task = Kinds(dropout=0.5, batch_norm=True)
    table = predicted(fabric, task)
    torch.manual_seed(0)
    y = forward(task, task.network())
    assert {name: (values.dtype, values.shape) for name, values in table.items()} == {
        "index": (np.int64, (23,)),
        "field": (np.float32, (23, 2, 3)),
        "first": (np.float32, (23, 1)),
        "sure": (np.bool_, (23,)),
        "class": (np.int64, (23,)),
        "wide": (np.float64, (23,)),
        "file": (np.dtype(object), (23,)),
    }
    assert np.array_equal(table["first"], y[:, :1]) and np.array_equal(table["wide"], y[:, 1].double())
    assert np.array_equal(table["field"][:, :, 2], y.bfloat16().float())
    assert table["file"][3] == 'no "3", Ä'


def test_every_format_gives_back_what_was_written(fabric, tmp_path):
    table = predicted(fabric, Kinds())
    for suffix in ("npz", "h5", "csv"):
        write(str(tmp_path / f"out.{suffix}"), table)
    with np.load(tmp_path / "out.npz") as archive:
        assert list(archive) == list(table)
        assert all(np.array_equal(archive[name], values) for name, values in table.items())
    with h5py.File(tmp_path / "out.h5") as archive:
        assert set(archive) == set(table)
        assert archive["file"].asstr()[:].tolist() == table["file"].tolist()
        numbers = {name: values for name, values in table.items() if name != "file"}
        assert all(archive[name].dtype == values.dtype for name, values in numbers.items())
        assert all(np.array_equal(archive[name], values) for name, values in numbers.items())
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["index", *(f"field_{i}" for i in range(6)), "first", "sure", "class", "wide", "file"]
    for name in ("index", "sure", "class", "file"):
        assert [line[name] for line in lines] == [str(value) for value in table[name]]
    assert np.array_equal(np.array([line["first"] for line in lines], np.float32), table["first"][:, 0])
    assert [float(line["wide"]) for line in lines] == table["wide"].tolist()
    field = np.array([[line[f"field_{i}"] for i in range(6)] for line in lines], np.float32)
    assert np.array_equal(field, table["field"].reshape(23, 6))
    assert {path.name for path in tmp_path.iterdir()} == {"out.npz", "out.h5", "out.csv"}


WRONG_ANSWERS = {
    "too few rows": ([{"y": torch.zeros(3, 2)}], "y must be a tensor of 4 rows .* not a Tensor of shape \\(3, 2\\)"),
    "no rows": ([{"y": torch.tensor(1.0)}], "not a Tensor of shape \\(\\)"),
    "numbers": ([{"y": [1, 2, 3, 4]}], "y must be .* or a list of 4 strings, for 4 samples, not a list$"),
    "index": ([{"index": torch.arange(4)}], "Answers.predict: index is the samples' places"),
    "ragged": ([{"y": torch.zeros(4, 2 + i % 2)} for i in range(5)], "same names and row shapes, not {'y'|'index'"),
    "names": ([{f"y{i}": torch.zeros(4)} for i in range(5)], "same names and row shapes"),
}


@pytest.mark.parametrize("answers, says", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())
def test_an_answer_that_is_no_row_per_sample_is_refused(fabric, answers, says):
    task = Answers(*answers)
    with pytest.raises(InputError, match=says):
        predict(fabric, task, task.network(), Split(fabric, task, Points(20, 1), 4))


def test_a_task_without_predict(tmp_path):
    with pytest.raises(InputError, match=r"^--predict: Mute has no predict\(network, batch\)$"):
        check_output(Mute(), str(tmp_path / "out.csv"))
    with pytest.raises(NotImplementedError, match="Mute must define predict"):
        Mute().predict(nn.Identity(), {})


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(home: Path) -> Path:  # noqa: F811
    assert run("--name", "a") == 0
    return home


def expected(which: str, samples: str = "val") -> np.ndarray:
    task = Regression(30)
    network = task.network()
    network.load_state_dict(load(Path("runs/a/checkpoints/last.pt"))[which])
    with torch.no_grad():
        return torch.cat([network(x) for x in task.dataset(samples).x.split(4)]).numpy()


def test_a_file_holds_the_forward_of_the_averaged_or_the_raw_weights(trained, capsys):
    capsys.readouterr()
    for weights, which in (("both", "averaged"), ("ema", "averaged"), ("raw", "raw")):
        assert run("--name", "a", "--predict", "last", "--out", "y.npz", "--evaluate.weights", weights) == 0
        path, said = "runs/a/checkpoints/last.pt", capsys.readouterr().out.splitlines()
        assert said[-2:] == [f"{path}: step 8, split val, {which} weights", "23 predictions in y.npz"]
        with np.load("y.npz") as archive:
            assert archive["index"].tolist() == list(range(23))
            assert np.array_equal(archive["y"], expected("model" if which == "raw" else "ema"))
    assert not np.array_equal(expected("model"), expected("ema"))


def test_another_split_and_a_checkpoint_without_average(home, capsys):  # noqa: F811
    (home / "toy.yaml").write_text(yaml.safe_dump({key: value for key, value in CONFIG.items() if key != "ema"}))
    assert run("--name", "a") == 0
    path = "runs/a/checkpoints/last.pt"
    # an average that the configuration keeps and the checkpoint doesn't have is not used
    assert run("--predict", path, "--out", "y.h5", "--split", "train", "--ema.decay", "0.9") == 0
    assert f"{path}: step 8, split train, raw weights\n30 predictions in y.h5\n" in capsys.readouterr().out
    with h5py.File("y.h5") as archive:
        assert archive["index"][:].tolist() == list(range(30))
        assert np.array_equal(archive["y"], expected("model", "train"))


class Unread(Regression):
    def prepare(self, root: Path) -> None:
        raise AssertionError("no data before the command is known to be right")


WRONG = {
    "suffix": (["--out", "y.txt"], "--out y.txt: predictions are written as .csv, .npz, .h5"),
    "no suffix": (["--out", "y"], "--out y: predictions are written as .csv, .npz, .h5"),
    "folder": (["--out", "nowhere/y.csv"], "--out nowhere/y.csv: there is no folder nowhere"),
    "is a folder": (["--out", "folder.csv"], "--out folder.csv: this is a folder"),
    "task": (["--out", "y.csv", "--task.path", "test_predict.Mute"], "--predict: Mute has no predict"),
}


@pytest.mark.parametrize("argv, says", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_written_is_refused_before_the_data_is_read(home, capsys, monkeypatch, argv, says):  # noqa: F811
    (home / "folder.csv").mkdir()
    monkeypatch.setattr(Regression, "prepare", Unread.prepare)
    assert says in error(capsys, "--predict", "last", *argv)


def test_other_wrong_input(trained, capsys):
    before = sorted(trained.rglob("*"))
    assert "--out y.csv is for --predict, --evaluate or --tune" in error(capsys, "--out", "y.csv")
    assert "needs --out FILE" in error(capsys, "--predict", "last")
    both = ("--predict", "last", "--evaluate", "last", "--out", "y.csv")
    assert "one at a time" in error(capsys, *both)
    assert "no checkpoint nowhere.pt" in error(capsys, "--predict", "nowhere.pt", "--out", "y.csv")
    assert "has no best.pt" in error(capsys, "--name", "nobody", "--predict", "best", "--out", "y.csv")
    assert run("--name", "a", "--predict", "last", "--out", "y.csv", "--split", "test") == 2
    said = capsys.readouterr().err
    assert "no test split" in said and said.count("\n") == 1
    line = error(capsys, "--name", "a", "--predict", "last", "--out", "y.csv", "--task.args.width", "9")
    assert "is not of this network" in line
    assert sorted(trained.rglob("*")) == before
