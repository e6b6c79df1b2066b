"""What a run sends to W&B, read from its own transaction log: values, histograms, the best, checkpoints."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lightning.fabric import Fabric
from torch import Tensor
from toys import Points, Regression, config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.checks import check
from fabric_trainer.config import Config, LoggersConfig, WandbConfig
from fabric_trainer.errors import InputError
from fabric_trainer.histogram import histogram
from fabric_trainer.history import read_history
from fabric_trainer.launch import Resolved
from fabric_trainer.loggers import Loggers
from fabric_trainer.state import State
from fabric_trainer.strategies import check_strategy
from fabric_trainer.wandb_logger import WandbLogger

EVERY = 4  # updates between two histograms
LAST = 22


class Recording(torch.optim.SGD):
    """Keeps what it gets and what it leaves, by shape: each parameter of the toy has its own."""

    steps: list[tuple[dict[torch.Size, Tensor], dict[torch.Size, Tensor]]] = []

    def step(self, closure: Any = None) -> None:
        gradients = {p.shape: p.grad.clone() for group in self.param_groups for p in group["params"]}
        super().step(closure)
        self.steps.append((gradients, {p.shape: p.detach().clone() for g in self.param_groups for p in g["params"]}))


class Poisoned(Regression):
    """One sample is NaN: the update that has it is left out, in every epoch another one."""

    def dataset(self, split: str) -> Points | None:
        made = super().dataset(split)
        if split == "train" and made is not None:
            made.x[17] = math.nan
        return made


@dataclass
class Sent:
    """What one session has sent."""

    id: str = ""
    exit_code: int = -1
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    @property
    def aliases(self) -> list[tuple[str, ...]]:
        return [tuple(artifact.aliases) for artifact in self.artifacts]


def sessions(folder: Path) -> list[Sent]:
    """Of all offline runs in the folder, oldest first."""
    return [wait_for(path) for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))]


def wait_for(path: Path) -> Sent:
    """A whole session: W&B's own process may still be writing the last records."""
    end = time.monotonic() + 20
    while (sent := read(path)).exit_code < 0 and time.monotonic() < end:
        time.sleep(0.05)
    return sent


def read(path: Path) -> Sent:
    from wandb.proto import wandb_internal_pb2

    sent = Sent(path.stem.removeprefix("run-"))
    for data in transaction_log(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            sent.config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "history":
            sent.rows.append(tree(record.history.item))
        elif kind == "summary":
            sent.summary |= tree(record.summary.update)
        elif kind == "artifact":
            sent.artifacts.append(record.artifact)
        elif kind == "exit":
            sent.exit_code = record.exit.exit_code
    return sent


def tree(items: Any) -> dict[str, Any]:
    """name -> value, or {"values": …, "bins": …} of a histogram; without W&B's own but for _step."""
    made: dict[str, Any] = {}
    for item in items:
        name, *rest = item.nested_key or [item.key]
        if rest and not name.startswith("_"):
            made.setdefault(name, {})[rest[0]] = json.loads(item.value_json)
        elif name == "_step" or not name.startswith("_"):
            made[name] = json.loads(item.value_json)
    return made


def transaction_log(data: bytes) -> Iterator[bytes]:
    """Its records: LevelDB's format, blocks of 32 KiB, after a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        if (room := -position % 32768) and room < 7:  # no header fits into the rest of the block
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(data):  # whole, or the last part
            yield parts
            parts = b""


def settings(**changes: object) -> Config:
    shared = {
        "optim.name": "test_wandb_logger.Recording",
        "optim.lr": 0.05,
        "optim.args": {"momentum": 0.9},
        "batch.accumulate": 2,
        "clip.norm": 0.5,
        "run.max_epochs": None,
        "run.max_steps": LAST,
        "run.log_every_n_steps": EVERY,
        "evaluate.every": "3 steps",
        "checkpoint.every": "4 steps",
        "checkpoint.monitor": "val/loss",
        "checkpoint.keep_last": 1,
        "loggers.tensorboard": False,
    }
    return config(**shared | changes)


def offline(**keys: Any) -> WandbConfig:
    return WandbConfig(project="test", mode="offline", tags=["a"], **keys)


@dataclass
class Run:
    folder: Path
    sent: list[Sent]
    optimizer: dict[int, tuple[dict[torch.Size, Tensor], dict[torch.Size, Tensor]]]  # by step
    state: State


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ended by an error in update 14, and continued from the checkpoint of update 8: twelve updates were sent."""
    pytest.importorskip("wandb")
    folder, optimizer = tmp_path_factory.mktemp("runs") / "some", {}
    wandb = offline(watch="all", log_checkpoints="all")
    made = settings(**{"loggers.wandb": wandb, "checkpoint.keep_every": "8 steps"})
    Recording.steps.clear()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[Ends()])
    with pytest.raises(ConnectionError):
        fit(fabric, Poisoned(), made, folder)
    optimizer |= dict(enumerate(Recording.steps, 1))
    Recording.steps.clear()
    saved = load(folder / "checkpoints" / "step-00000008.pt")
    state = fit(Fabric(accelerator="cpu", devices=1), Poisoned(), made, folder, saved)
    optimizer |= dict(enumerate(Recording.steps, 9))
    return Run(folder, sessions(folder), optimizer, state)


class Ends:
    def on_update_end(self, state: State, metrics: dict[str, float]) -> None:
        if state.counters.step == 13:
            raise ConnectionError


def test_every_value_is_there_once_and_at_its_step(run: Run) -> None:
    first, second = run.sent
    note = json.loads((run.folder / "wandb.json").read_text())
    assert first.id == second.id == note["id"] and note["step"] == LAST
    assert [row["_step"] for row in first.rows] == list(range(1, 13))
    assert [row["_step"] for row in second.rows] == list(range(13, LAST + 1))
    with (run.folder / "metrics.csv").open(newline="") as file:
        expected = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    timed = {"samples_per_second", "memory/peak", "step"}
    for row, cells in zip(first.rows + second.rows, expected, strict=True):
        assert {name: row[name] for name in cells.keys() - timed} == {n: cells[n] for n in cells.keys() - timed}
    evaluations = {e["step"]: e for e in read_history(run.folder).evaluations}
    sent = {row["_step"]: row["val/loss"] for row in first.rows + second.rows if "val/loss" in row}
    assert sent == {step: entry["val/loss"] for step, entry in evaluations.items()} and len(sent) >= 7
    assert first.config["optim"]["lr"] == 0.05
    assert (first.exit_code, second.exit_code) == (1, 0)


def test_histograms_are_of_the_update_that_they_are_with(run: Run) -> None:
    assert run.state.counters.skipped >= 3
    rows = {row["_step"]: row for sent in run.sent for row in sent.rows}
    names = {"0.weight": (16, 8), "0.bias": (16,), "3.weight": (2, 16), "3.bias": (2,)}
    expected = {f"{kind}/{name}" for kind in ("gradients", "parameters") for name in names}
    for step, row in rows.items():
        assert {name for name, value in row.items() if isinstance(value, dict)} == (set() if step % EVERY else expected)
    for step in range(EVERY, LAST + 1, EVERY):
        gradients, weights = run.optimizer[step]
        for kind, tensors in (("gradients", gradients), ("parameters", weights)):
            for name, shape in names.items():
                drawn, values = rows[step][f"{kind}/{name}"], tensors[torch.Size(shape)].double().numpy()
                counts, edges = np.histogram(values, bins=64)
                assert drawn["values"] == counts.tolist(), (step, kind, name)
                assert drawn["bins"] == pytest.approx(edges, rel=1e-6, abs=1e-9)


def test_watching_changes_nothing(run: Run, fabric: Fabric) -> None:
    plain = fit(fabric, Poisoned(), settings())
    for (name, mine), (_, watched) in zip(
        plain.module.state_dict().items(), run.state.module.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, watched), name


def test_the_best_is_in_the_summary(run: Run) -> None:
    evaluations = read_history(run.folder).evaluations
    for sent, last in zip(run.sent, (12, LAST), strict=True):
        best = min((e for e in evaluations if e["step"] <= last), key=lambda e: e["val/loss"])
        shown = {name: value for name, value in sent.summary.items() if name.startswith("best/")}
        assert shown == {f"best/{name}": best[name] for name in ("step", "val/loss", "val/abs")}
    assert run.sent[1].summary["best/step"] < LAST, "not the last one"


def test_the_model_is_in_the_summary_of_the_first_session(run: Run) -> None:
    first, second = run.sent
    assert "graph_0" not in second.summary and first.summary["graph_0"]["_type"] == "graph-file"
    (path,) = (run.folder / "wandb").glob(f"offline-run-*/files/{first.summary['graph_0']['path']}")
    nodes = json.loads(path.read_text())["nodes"]
    assert [(node["name"], node["class_name"], node["parameters"], node["num_parameters"]) for node in nodes] == [
        ("0", "Linear", [["weight", [16, 8]], ["bias", [16]]], [128, 16]),
        ("1", "Tanh", [], []),
        ("2", "Dropout", [], []),
        ("3", "Linear", [["weight", [2, 16]], ["bias", [2]]], [32, 2]),
    ]


def test_all_checkpoints_are_artifacts_once(run: Run) -> None:
    artifacts = [artifact for sent in run.sent for artifact in sent.artifacts]
    steps = [json.loads(artifact.metadata)["step"] for artifact in artifacts]
    assert steps == sorted(set(steps)) and {4, 8, 12, 16, 20, LAST} <= set(steps)
    best = math.inf
    for artifact in artifacts:
        assert (artifact.name, artifact.type) == (f"model-{run.sent[0].id}", "model")
        metadata, (file,) = json.loads(artifact.metadata), artifact.manifest.contents
        assert file.path == f"step-{metadata['step']:08d}.pt"
        data = Path(file.local_path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == metadata["sha256"] and len(data) == file.size
        model = torch.load(file.local_path, weights_only=True)["model"]
        _, weights = run.optimizer[metadata["step"]]
        assert all(torch.equal(value, weights[value.shape]) for value in model.values())
        improved = metadata.get("val/loss", math.inf) < best
        best = min(best, metadata.get("val/loss", math.inf))
        assert set(artifact.aliases) == {"latest", f"step-{metadata['step']}", *["best"] * improved}
    kept = {path.name for path in (run.folder / "checkpoints").glob("step-*.pt")}
    assert len(kept) < len(artifacts), "rotated ones are artifacts too"


# ---- further sessions, of the logger alone ------------------------------------------------------------------------


def saves(folder: Path, step: int, loss: float, content: bytes) -> None:
    """As ``Checkpoints`` leaves a file that is the best of the run."""
    path = folder / "checkpoints" / f"step-{step}.pt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    entry = {"window": step, "step": step, "metrics": {"val/loss": loss, "val/x": math.nan}, "keep": False}
    index = {path.name: entry | {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    (path.parent / "index.json").write_text(json.dumps(index))
    (path.parent / "best.pt").unlink(missing_ok=True)
    (path.parent / "best.pt").symlink_to(path.name)


def test_the_best_checkpoint_is_one_artifact_of_each_session_that_has_a_new_one(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for step, code in ((3, 75), (3, 1), (6, 0)):
        logger = WandbLogger(tmp_path, offline(log_checkpoints="best"), "some run", {"seed": 3})
        saves(tmp_path, step, 1 / step, b"x" * step)
        path = (tmp_path / "checkpoints" / "best.pt").resolve()
        logger.log_checkpoint(path, json.loads((path.parent / "index.json").read_text())[path.name])
        logger.close(code)
        path.unlink()  # rotated away
    found = {sent.exit_code: sent.artifacts for sent in sessions(tmp_path)}
    assert found[1] == []
    for (artifact,), step in ((found[75], 3), (found[0], 6)):
        (file,) = artifact.manifest.contents
        assert Path(file.local_path).read_bytes() == b"x" * step
        assert set(artifact.aliases) == {"latest", "best", f"step-{step}"}
        content = hashlib.sha256(b"x" * step).hexdigest()
        assert json.loads(artifact.metadata) == {"step": step, "val/loss": 1 / step, "sha256": content}


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty_folder", [False, True])  # ./wandb/, left by runs, imports as a package without init
def test_a_missing_package_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_folder: bool
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb") if empty_folder else None)  # type: ignore[arg-type]
    made = Config(loggers=LoggersConfig(wandb=offline()))
    with pytest.raises(InputError, match="pip install wandb"):
        Loggers.build(tmp_path, made, "run")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_can_t_be_sent_are_refused() -> None:
    both = WandbConfig(log_checkpoints="all"), WandbConfig(log_checkpoints="best")
    for wandb in both:
        with pytest.raises(InputError, match=f"loggers.wandb.log_checkpoints: {wandb.log_checkpoints} sends files"):
            check(settings(**{"loggers.wandb": wandb, "checkpoint.sharded": True}))
    check(settings(**{"loggers.wandb": both[0], "checkpoint.monitor": None}))
    for lacking in ({"checkpoint.monitor": None}, {"checkpoint.top_k": 0}):
        with pytest.raises(InputError, match=r"log_checkpoints: best needs best\.pt"):
            check(settings(**{"loggers.wandb": both[1]} | lacking))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp1", "tensor_parallel", "deepspeed", "ddp"])
def test_pieces_are_not_watched(strategy: str) -> None:
    made = settings(**{"loggers.wandb": WandbConfig(watch="gradients"), "fabric.strategy": strategy})
    resolved = Resolved(strategy, "cuda", 2, 1, "32-true", 2)
    with (
        nullcontext() if strategy == "ddp" else pytest.raises(InputError, match=f"loggers.wandb.watch: {strategy} has")
    ):
        check_strategy(made, resolved)


# ---- histograms ---------------------------------------------------------------------------------------------------


@given(arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_a_histogram_counts_every_element_in_a_bin_that_holds_it(values: np.ndarray) -> None:
    made = histogram(torch.from_numpy(values))
    assert made is not None
    counts, edges = made
    assert sum(counts) == len(values) and len(edges) == len(counts) + 1
    assert (edges[0], edges[-1]) == (values.min(), values.max())
    if len(counts) > 1:
        # the sums up to each edge, but for elements within a rounding of it
        slack = (edges[-1] - edges[0]) * 1e-6 + 1e-44
        below = np.cumsum(counts)[:-1]
        inner = np.array(edges[1:-1])
        assert ((values[:, None] < inner - slack).sum(0) <= below).all()
        assert (below <= (values[:, None] < inner + slack).sum(0)).all()


def test_a_histogram_of_what_is_not_finite_or_not_there() -> None:
    assert histogram(torch.tensor([1.0, math.nan])) is None
    assert histogram(torch.tensor([1.0, math.inf])) is None
    assert histogram(torch.tensor([-3e38, 3e38])) is None
    assert histogram(torch.empty(0)) is None
    assert histogram(torch.full((3, 2), 0.5, dtype=torch.bfloat16)) == ([6], [0.5, 0.5])
    whole = histogram(torch.arange(65.0))
    assert whole == ([1] * 63 + [2], [float(edge) for edge in range(65)])
