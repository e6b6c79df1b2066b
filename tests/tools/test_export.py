"""What is exported computes what the checkpoint does, wherever it is loaded; the rest is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from torch import Tensor, nn
from toys import Points, Regression, config

from fabric_trainer import Loss, cli, fit, sharded
from fabric_trainer.cli import make_task
from tools.export import main
from tools.quantize import SCALE, matrices, quantize, restore, to_int8

FORMATS = ("state_dict", "safetensors", "torch_export", "onnx")
KINDS = {"raw": FORMATS[:3], "ema": FORMATS[1:]}


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"words": (torch.arange(5) * (i + 1)) % 11}


class Tied(nn.Module):
    """An embedding that is the head's matrix too, attention between, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, words: Tensor, *, scale: Tensor, deep: bool = True) -> dict[str, Tensor]:
        x = self.embedding(words) * scale[:, None, None]
        x = self.block(x) if deep else x
        return {"words": self.head(x), "state": x}


class Language(Regression):
    """Has no ``predict``: its network is called as ``evaluate`` does."""

    predict = Regression.__base__.predict

    def dataset(self, split: str) -> Words | None:
        return Words() if split in ("train", "val") else None

    def network(self) -> nn.Module:
        return Tied()

    def loss(self, network, batch):
        scale = torch.ones(len(batch["index"]))
        out = network(scale=scale, words=batch["words"])["words"]
        error = nn.functional.cross_entropy(out.transpose(1, 2), batch["words"].roll(-1, 1), reduction="none").mean(1)
        return Loss((error * batch["weight"]).sum())


class Odd(Regression):
    """A network with something special in its forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def network(self) -> nn.Module:
        return OddNetwork(self.kind)

    def predict(self, network, batch):
        return {"y": network.first(batch["x"]) if self.kind == "goes around it" else network(batch["x"])}


class OddNetwork(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first = kind, nn.Linear(8, 2) if kind != "no matrix" else nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "one size":
            return self.first(x).reshape(len(x), 2)
        if self.kind == "branches" and x.sum() > 0:
            return self.first(-x)
        if self.kind == "has no operator":
            return self.first(x) + torch.linalg.eigh(x.T @ x)[0][:2]
        if self.kind == "random":
            return self.first(x) + torch.rand(())
        return self.first(x[:, :2]) if self.kind == "no matrix" else self.first(x)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs``: reg, with BatchNorm and dropout; language; one for each odd network."""
    folder = tmp_path_factory.mktemp("runs")
    odd = ("one size", "branches", "has no operator", "random", "no matrix", "goes around it")
    tasks: dict[str, tuple[str, dict]] = {kind: ("test_export.Odd", {"kind": kind}) for kind in odd}
    tasks["reg"] = ("toys.Regression", {"dropout": 0.2, "batch_norm": True})
    tasks["language"] = ("test_export.Language", {})
    for name, (path, arguments) in tasks.items():
        made = config(**{"optim.lr": 0.02, "loggers.tensorboard": False})
        made.task.path, made.task.args = path, arguments
        if name in odd:
            made.run.max_steps = 1
        else:
            made.ema.decay = 0.9
        fit(Fabric(accelerator="cpu", devices=1), make_task(made), made, folder / "runs" / name)
    return folder


@pytest.fixture
def home(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(runs)
    return runs


def checkpoint(home: Path, name: str) -> dict:
    return torch.load(home / "runs" / name / "checkpoints" / "last.pt", weights_only=True)


def write(capsys: pytest.CaptureFixture, name: str, form: str, out: Path, *more: str) -> str:
    capsys.readouterr()
    code = main(["last", "--name", name, "--format", form, "--out", str(out), *more])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(argv) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


READ = """
import sys, torch
import onnxruntime, safetensors.torch
from torch import nn
folder, x = sys.argv[1], torch.load(sys.argv[1] + "/x.pt")
def bare(weights):
    network = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2)).eval()
    network.load_state_dict(weights)
    return network(x)
made = {("raw", "state_dict"): bare(torch.load(f"{folder}/raw.state_dict", weights_only=True))}
for kind in ("raw", "ema"):
    made[kind, "safetensors"] = bare(safetensors.torch.load_file(f"{folder}/{kind}.safetensors"))
    made[kind, "torch_export"] = torch.export.load(f"{folder}/{kind}.torch_export").module()(x)
session = onnxruntime.InferenceSession(f"{folder}/ema.onnx")
made["ema", "onnx"] = torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])
assert "fabric_trainer" not in sys.modules and "lightning" not in sys.modules
torch.save(made, folder + "/y.pt")
"""


def test_every_format_in_a_process_without_this_library(home, tmp_path, capsys):
    for weights, forms in KINDS.items():
        for form in forms:
            said = write(capsys, "reg", form, tmp_path / f"{weights}.{form}", "--weights", weights)
            assert f"step 26, {weights} weights of toys.Regression" in said
            assert "outputs differ by" in said and "on 11 samples" in said
            assert ("batch size: any" in said) == (form in ("torch_export", "onnx"))
    assert {path.name for path in tmp_path.iterdir()} == {f"{w}.{f}" for w, forms in KINDS.items() for f in forms}
    x = torch.randn(50, 8)
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", READ, str(tmp_path)], cwd=tmp_path, check=True)
    expected = {}
    for weights, key in (("raw", "model"), ("ema", "ema")):
        network = Regression(dropout=0.2, batch_norm=True).network().eval()
        network.load_state_dict(checkpoint(home, "reg")[key])
        expected[weights] = network(x).detach()
    assert (expected["raw"] - expected["ema"]).abs().max() > 1e-3
    for (weights, _), y in torch.load(tmp_path / "y.pt").items():
        torch.testing.assert_close(y.detach(), expected[weights], rtol=0, atol=1e-5)


def test_the_state_dict_is_the_checkpoints_own(home, tmp_path, capsys):
    write(capsys, "reg", "state_dict", tmp_path / "a.pt", "--weights", "ema")
    made, saved = torch.load(tmp_path / "a.pt", weights_only=True), checkpoint(home, "reg")["ema"]
    assert list(made) == list(saved) and all(torch.equal(made[name], saved[name]) for name in saved)


def test_what_a_file_says_of_itself(home, tmp_path, capsys):
    import onnxruntime
    from safetensors import safe_open

    for form in FORMATS[1:]:
        write(capsys, "language", form, tmp_path / form, "--weights", "ema", "--quantize", "fp16")
    with safe_open(tmp_path / "safetensors", "pt") as file:
        notes, names = file.metadata(), list(file.keys())
    assert notes.pop("format") == "pt"
    # one tensor, and where its other name finds it
    assert notes.pop("head.weight") == "embedding.weight" and "head.weight" not in names
    assert notes == {"step": "6", "weights": "ema", "task": "test_export.Language", "quantize": "fp16"}
    extra = {"notes.json": ""}
    program = torch.export.load(tmp_path / "torch_export", extra_files=extra)
    assert json.loads(extra["notes.json"]) == notes
    assert program.example_inputs is None, "samples do not belong in the file"
    session = onnxruntime.InferenceSession(tmp_path / "onnx")
    assert notes.items() <= session.get_modelmeta().custom_metadata_map.items()
    assert [value.name for value in session.get_inputs()] == ["words", "scale"]
    assert [value.name for value in session.get_outputs()] == ["words_out", "state"]
    assert len({value.shape[0] for value in session.get_inputs() + session.get_outputs()} - {4}) == 1


def test_tied_weights_load_as_the_formats_own_readers_do(home, tmp_path, capsys):
    from safetensors.torch import load_model

    words, scale = torch.randint(11, (6, 5)), torch.rand(6)
    network = Tied().eval()
    network.load_state_dict(checkpoint(home, "language")["model"])
    expected = network(words, scale=scale)["words"]
    write(capsys, "language", "safetensors", tmp_path / "a")
    again = Tied().eval()
    load_model(again, tmp_path / "a", strict=True)
    assert again.head.weight is again.embedding.weight
    torch.testing.assert_close(again(words, scale=scale)["words"], expected, rtol=0, atol=1e-6)
    write(capsys, "language", "state_dict", tmp_path / "b")
    made = torch.load(tmp_path / "b", weights_only=True)
    assert made["head.weight"].data_ptr() == made["embedding.weight"].data_ptr()
    again = Tied().eval()
    again.load_state_dict(made)
    torch.testing.assert_close(again(words, scale=scale)["words"], expected, rtol=0, atol=1e-6)


def test_a_folder_of_shards(home, tmp_path, capsys):
    saved = checkpoint(home, "reg")
    (tmp_path / "shards").mkdir()
    sharded.write(tmp_path / "shards", saved, None)
    assert main([str(tmp_path / "shards"), "--format", "state_dict", "--out", str(tmp_path / "a.pt")]) == 0
    made = torch.load(tmp_path / "a.pt", weights_only=True)
    assert all(torch.equal(made[name], saved["model"][name]) for name in saved["model"])


# ---- fewer bits ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.floats(-6, 6), st.integers(0, 2**31))
def test_int8_moves_no_weight_by_more_than_half_its_scale(rows, columns, size, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**size
    weight[0] = 0
    q, scale = to_int8(weight)
    assert q.dtype == torch.int8 and scale.shape == (rows, 1) and scale.dtype == torch.float32
    assert ((q.float() * scale - weight).abs() <= scale * 0.5001).all()
    assert (q[0] == 0).all() and int(q.abs().max()) <= 127
    if rows > 1:
        assert (q[1:].abs().amax(1) == 127).all(), "the largest of a row uses all bits"


def test_what_is_quantized_and_what_is_shared():
    network = Tied()
    state = network.state_dict()
    state["head.weight"] = state["embedding.weight"]
    attention = {"block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight"}
    mlp = {"block.linear1.weight", "block.linear2.weight"}
    assert matrices(network) == {"embedding.weight", "head.weight"} | attention | mlp
    stored = quantize(network, state, "int8")
    assert stored["head.weight"] is stored["embedding.weight"] and stored["head.weight"].dtype == torch.int8
    assert stored["block.norm1.weight"] is state["block.norm1.weight"]
    assert {name for name in stored if name.endswith(SCALE)} == {name + SCALE for name in matrices(network)}
    network.load_state_dict(restore(stored), strict=True)
    half = quantize(network, state, "fp16")
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert all(torch.equal(value, state[name].half().float()) for name, value in restore(half).items())


def losses(weights: dict[str, Tensor]) -> float:
    """val/loss of the run ``reg``, by plain torch."""
    network, points = Regression(batch_norm=True).network().eval(), Points(23, 1)
    network.load_state_dict(weights)
    with torch.no_grad():
        return float((network(points.x) - points.y).square().sum(1).double().mean())


def test_metrics_before_and_after(home, tmp_path, capsys):
    x = torch.randn(30, 8)
    for how, form in (("int8", "safetensors"), ("int8", "torch_export"), ("fp16", "onnx"), ("fp16", "state_dict")):
        out = tmp_path / f"{form}.{how}"
        said = write(capsys, "reg", form, out, "--quantize", how)
        (line,) = [line.split() for line in said.splitlines() if line.startswith("val/loss")]
        before, after = float(line[1]), float(line[2])
        history = json.loads((home / "runs/reg/history.json").read_text())["evaluations"][-1]
        assert before == pytest.approx(history["val/loss"], rel=1e-5)
        assert after == pytest.approx(before, rel=0.05) and (after != before or how == "fp16")
        saved = checkpoint(home, "reg")["model"]
        small = quantize(Regression(batch_norm=True).network(), saved, how)
        assert losses(restore(small)) == pytest.approx(after, rel=1e-5), "what is measured is what the file restores"
        assert f"{sum(value.nbytes for value in small.values()):,}" in said
        network = Regression(batch_norm=True).network().eval()
        network.load_state_dict(restore(small))
        if form == "torch_export":
            program = torch.export.load(out)
            assert sum(value.dtype == torch.int8 for value in program.state_dict.values()) == 2
            torch.testing.assert_close(program.module()(x), network(x), rtol=0, atol=1e-5)
    from safetensors.torch import load_file

    read = load_file(tmp_path / "safetensors.int8")
    # as the documentation tells to read it
    read = {n: w.float() * read[n + "_scale"] if w.dtype == torch.int8 else w for n, w in read.items()}
    read = {name: weight for name, weight in read.items() if not name.endswith("_scale")}
    assert losses(read) == pytest.approx(losses(restore(quantize(network, saved, "int8"))), rel=1e-6)
    half = torch.load(tmp_path / "state_dict.fp16", weights_only=True)  # load_state_dict alone reads it
    assert half["0.weight"].dtype == torch.float16 and half["1.running_var"].dtype == torch.float32
    assert losses(half) == pytest.approx(after, rel=1e-5)


def test_what_does_not_fit_in_half_precision(home, tmp_path, capsys):
    saved = checkpoint(home, "reg")
    saved["config"]["batch"] |= {"micro_batch_size": "auto", "global_batch_size": 4}  # what was found is beside it
    saved["model"]["4.weight"][1, 3] = 60000.0
    torch.save(saved, tmp_path / "auto.pt")
    arguments = [str(tmp_path / "auto.pt"), "--format", "state_dict", "--quantize", "fp16"]
    assert main([*arguments, "--out", str(tmp_path / "b.pt")]) == 0
    saved["model"]["4.weight"][1, 3] = -70000.0
    torch.save(saved, tmp_path / "large.pt")
    arguments = [str(tmp_path / "large.pt"), "--format", "state_dict", "--out", str(tmp_path / "a.pt")]
    line = refused(capsys, *arguments, "--quantize", "fp16")
    assert "4.weight has a weight of 7e+04, fp16 ends at 65504" in line


# ---- what can't be --------------------------------------------------------------------------------------------------


def test_one_batch_size_where_the_network_allows_no_other(home, tmp_path, capsys):
    for form in ("torch_export", "onnx"):
        said = write(capsys, "one size", form, tmp_path / form)
        assert "batch size: 4 and no other; " in said and "on 8 samples" in said
    x = torch.randn(4, 8)
    network = OddNetwork("one size")
    network.load_state_dict(checkpoint(home, "one size")["model"])
    torch.testing.assert_close(torch.export.load(tmp_path / "torch_export").module()(x), network(x))


@pytest.mark.parametrize(
    "name, form, says",
    [
        ("branches", "torch_export", "torch.export can't trace this network: "),
        ("has no operator", "onnx", "onnx can't express this network: "),
        ("random", "state_dict", "more than 1e-05: nothing was written"),
    ],
)
def test_what_a_format_can_not_say(home, tmp_path, capsys, name, form, says):
    line = refused(capsys, "last", "--name", name, "--format", form, "--out", str(tmp_path / "a"), code=1)
    assert says in line and (name != "has no operator" or "eigh" in line)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_gets_one_line(home, tmp_path, capsys):
    out = tmp_path / "a.pt"

    def line(*argv: str) -> str:
        return refused(capsys, *argv, "--format", "state_dict", "--out", str(out))

    assert "best needs --name" in line("best")
    assert "run nobody in runs/ has no best.pt" in line("best", "--name", "nobody")
    assert "there is no checkpoint x.pt" in line("x.pt")
    assert "--weights ema: " in line("last", "--name", "random", "--weights", "ema")
    assert "no samples there" in line("last", "--name", "reg", "--split", "test")
    assert "misshapen: 0.weight (16, 8) for (9, 8)" in line("last", "--name", "reg", "--task.args.width", "9")
    assert "--task.breadth" in line("last", "--name", "reg", "--task.breadth", "9")
    assert "no linear layer" in line("last", "--name", "no matrix", "--quantize", "int8")
    assert "Odd.predict never calls network(...)" in line("last", "--name", "goes around it")
    assert not out.exists()
    out.write_text("mine")
    assert "a.pt exists" in line("last", "--name", "reg")
    assert "there is no folder" in refused(capsys, "x.pt", "--format", "onnx", "--out", str(tmp_path / "no/a.onnx"))
    assert out.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["burgers1d", "burgers1d and darcy2d"])
def test_the_physics_network_for_any_batch_size(home, tmp_path, capsys, monkeypatch, tasks):
    import onnxruntime

    monkeypatch.setenv("FABRIC_TRAINER_DATA", str(tmp_path / "data"))
    command = ["--config", str(REPOSITORY / "configs" / "burgers_tiny.yaml"), "--run.root", str(tmp_path / "runs")]
    given = {"u0": torch.randn(7, 1, 1, 64)}
    if tasks != "burgers1d":  # of two grids: flat rows, whose tasks the graph is told
        command += ["--task.args.tasks=[burgers1d, darcy2d]", "--task.args.symmetries=null", "--run.max_steps=12"]
        command += ["--task.args.made={burgers1d: {nx: 64, frames: 21}, darcy2d: {nx: 16}}"]
        given = {"u0": torch.randn(7, 256), "task": torch.tensor([0, 1, 1, 0, 0, 1, 0])}
    assert cli.main([*command, "--name", "b"]) == 0
    path = str(tmp_path / "runs/b/checkpoints/last.pt")
    for how in ([], ["--quantize", "int8"]):
        made = []
        for form in ("torch_export", "onnx"):
            capsys.readouterr()
            out = tmp_path / f"{form}{len(how)}"
            assert main([path, "--weights", "ema", "--format", form, "--out", str(out), *how]) == 0
            assert "batch size: any" in capsys.readouterr().out
            if form == "onnx":
                fed = {f"batch_{name}": value.numpy() for name, value in given.items()}
                made.append(torch.from_numpy(onnxruntime.InferenceSession(out).run(["u1"], fed)[0]))
            else:
                made.append(torch.export.load(out).module()(given)["u1"].detach())
        assert made[0].shape == given["u0"].shape
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-5)
