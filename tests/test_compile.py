"""A compiler that fails leaves no trace but a line; one that works changes nothing but the speed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import register_backend
from toys import Regression, config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.checks import check
from fabric_trainer.errors import CompileError, InputError
from fabric_trainer.state import State

graphs: list[torch.fx.GraphModule] = []  # what the backends below were given
OK_FOR = {"graphs": 10**6}  # graphs that ``some`` compiles before it fails


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    graphs.clear()
    OK_FOR["graphs"] = 10**6
    yield
    torch.compiler.reset()


def unchanged(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    return make_boxed_func(graph.forward)


def spoilt(*_: Any) -> Callable:
    raise OSError("no such instruction\nand a long story")


register_backend(compiler_fn=spoilt, name="fails")
register_backend(compiler_fn=aot_autograd(fw_compiler=unchanged, bw_compiler=spoilt), name="fails_backward")


def kept(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    graphs.append(graph)
    return unchanged(graph, inputs)


register_backend(compiler_fn=aot_autograd(fw_compiler=unchanged, bw_compiler=kept), name="backwards")


@register_backend
def some(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """Autograd's graphs run as they are, until ``OK_FOR`` of them are made."""
    graphs.append(graph)
    if len(graphs) > OK_FOR["graphs"]:
        spoilt()
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class Block(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module], pieces: bool) -> None:
        super().__init__()
        # no bias: before a norm it has no gradient but noise, of which AdamW would make steps
        self.linear, self.norm, self.dropout = nn.Linear(width, width, False), norm(width), nn.Dropout(0.3)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm(self.linear(x)))
        if self.pieces:
            torch._dynamo.graph_break()
        return x + torch.tanh(self.dropout(y))


class Network(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d, pieces: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)
        self.blocks = nn.ModuleList(Block(16, norm, pieces) for _ in range(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # another tensor each time
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Blocks(Regression):
    """Dropout, BatchNorm and a buffer that the network itself replaces, in windows of three micro-batches."""

    def __init__(self, samples: int = 48, norm: type[nn.Module] = nn.BatchNorm1d, pieces: bool = False) -> None:
        super().__init__(samples)
        self.norm, self.pieces = norm, pieces

    def network(self) -> nn.Module:
        return Network(self.norm, self.pieces)

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        return network.blocks


def trained(fabric: Any, scope: str = "whole", task: Regression | None = None, **keys: Any) -> State:
    changes = {"batch.accumulate": 3, "optim.lr": 1e-2, "ema.decay": 0.9, "compile.scope": scope} | keys
    return fit(fabric, task or Blocks(), config(**changes))


def assert_same(a: State, b: State) -> None:
    """Weights, statistics, averages and moments, bit for bit."""
    for key in ("model", "ema"):
        assert all(torch.equal(value, b.state_dict()[key][name]) for name, value in a.state_dict()[key].items()), key
    moments = b.engine.moments()
    for name, values in a.engine.moments().items():
        assert all(torch.equal(value, moments[name][key]) for key, value in values.items())
    assert a.history.evaluations[-1]["val/loss"] == b.history.evaluations[-1]["val/loss"]


def said(capsys: Any) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "compile" in line]


# ---- a compiler that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, scope",
    [
        ("fails", "whole"),
        ("fails_backward", "blocks"),
        pytest.param("fails", "blocks", marks=pytest.mark.slow),
        pytest.param("fails_backward", "whole", marks=pytest.mark.slow),
    ],
)
def test_a_failure_at_first_use_ends_as_the_eager_run_with_one_line(fabric, capsys, backend, scope):
    eager = trained(fabric, "none")
    assert said(capsys) == []
    fallen = trained(fabric, scope, **{"compile.backend": backend})
    (line,) = said(capsys)
    assert line == "compile: the compiler failed, everything runs in eager from here on: OSError: no such instruction"
    assert_same(eager, fallen)


@pytest.mark.parametrize("compiled", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_a_failure_after_some_pieces_of_the_forward_have_run(fabric, capsys, compiled):
    """Their dropout masks and statistics are taken back."""
    eager = trained(fabric, "none", Blocks(pieces=True))
    OK_FOR["graphs"] = compiled
    fallen = trained(fabric, "whole", Blocks(pieces=True), **{"compile.backend": "some"})
    assert len(said(capsys)) == 1 and len(graphs) == compiled + 1
    assert_same(eager, fallen)


@pytest.mark.parametrize("backend", [pytest.param("fails", marks=pytest.mark.slow), "fails_backward"])
def test_required_a_failure_is_an_error(fabric, backend):
    with pytest.raises(CompileError, match=r"^compile\.require: the compiler failed: OSError: no such instruction$"):
        trained(fabric, "whole", **{"compile.backend": backend, "compile.require": True})


def test_nothing_is_left_uncompiled_silently(fabric, capsys):
    class Hidden(Network):
        forward = torch.compiler.disable(Network.forward)

    class Hides(Blocks):
        def network(self) -> nn.Module:
            return Hidden()

    eager = trained(fabric, "none", Hides())
    assert_same(eager, trained(fabric, "whole", Hides(), **{"compile.backend": "some"}))
    (line,) = said(capsys)
    assert "no graph was made of Hidden" in line and not graphs
    with pytest.raises(CompileError, match="no graph was made of Hidden"):
        trained(fabric, "whole", Hides(), **{"compile.backend": "some", "compile.require": True})


@pytest.mark.parametrize(
    "error, fullgraph",
    [
        (KeyError("mine"), False),
        (RuntimeError("mine"), True),
        (None, False),
        *(pytest.param(e, f, marks=pytest.mark.slow) for e, f in ((KeyError("mine"), True), (None, True))),
    ],
)
def test_an_error_of_the_networks_own_comes_out_unchanged(fabric, error, fullgraph):
    class Breaks(Network):
        def forward(self, x: Tensor) -> Tensor:
            if error is not None:
                raise error
            return self.last(super().forward(x))

    class Broken(Blocks):
        def network(self) -> nn.Module:
            return Breaks()

    kind, text = (type(error), "mine") if error else (RuntimeError, "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(kind, match=text) as caught:
        trained(fabric, "whole", Broken(), **{"compile.backend": "some", "compile.fullgraph": fullgraph})
    assert type(caught.value) is kind


# ---- later ----------------------------------------------------------------------------------------------------------


def test_a_failure_at_a_second_shape_leaves_the_run_in_eager(fabric, capsys, tmp_path):
    """50 samples in micro-batches of 4: the last has 2. A resume goes on in eager at once, and ends the same."""
    changes = {"batch.accumulate": 3, "optim.lr": 1e-2, "ema.decay": 0.9, "compile.scope": "whole"}
    changes |= {"compile.backend": "some", "compile.dynamic": False, "checkpoint.every": "5 steps"}
    changes |= {"evaluate.every": "100 steps", "checkpoint.keep_last": 10}
    eager = fit(fabric, Blocks(50), config(**changes | {"compile.scope": "none"}))
    OK_FOR["graphs"] = 1
    whole = fit(fabric, Blocks(50), config(**changes), tmp_path)
    (line,) = said(capsys)
    assert "OSError" in line and len(graphs) == 2 and not whole.compilation.active
    for name, value in eager.module.state_dict().items():
        assert torch.equal(value, whole.module.state_dict()[name])
    graphs.clear()
    steps = sorted((tmp_path / "checkpoints").glob("step-*.pt"))
    assert len(steps) == 2
    saved = load(steps[0])
    resumed = fit(fabric, Blocks(50), config(**changes), saved=saved)
    assert said(capsys) == [] and not graphs, "it had fallen back in the fifth window"
    assert_same(whole, resumed)
    # another configuration asks for another try
    other = fit(fabric, Blocks(50), config(**changes | {"compile.dynamic": True}), saved=saved)
    assert other.compilation.active is False and len(graphs) > 0


@torch._dynamo.config.patch(recompile_limit=1)
def test_the_recompilation_limit_is_told(fabric, capsys):
    eager = trained(fabric, "none", Blocks(50))
    changes = {"compile.backend": "some", "compile.dynamic": False}
    assert_same(eager, trained(fabric, "whole", Blocks(50), **changes))
    (line,) = said(capsys)
    assert "more than 1 graphs of one forward" in line and "compile.dynamic: true" in line
    with pytest.raises(CompileError, match="more than 1 graphs"):
        trained(fabric, "whole", Blocks(50), **changes, **{"compile.require": True})


def test_ranks_that_share_layers_stop_at_a_later_failure(fabric):
    """In the forward they wait for each other: one of them can't do it another way."""
    state = State(fabric, Blocks(50), config(**{"compile.scope": "whole", "compile.backend": "some"}))
    state.compilation.separable, OK_FOR["graphs"] = False, 1
    with pytest.raises(CompileError, match="share layers have no way back: OSError: no such instruction"):
        fit(fabric, state.task, state.config, state=state)
    OK_FOR["graphs"] = 0  # at first use they have
    graphs.clear()
    state = State(fabric, Blocks(), state.config)
    state.compilation.separable = False
    assert fit(fabric, state.task, state.config, state=state).counters.step == 24


def test_a_failure_in_an_evaluation_leaves_the_run_in_eager(fabric, capsys):
    eager = trained(fabric, "none")
    OK_FOR["graphs"] = 1  # the training graph
    assert_same(eager, trained(fabric, "whole", **{"compile.backend": "some"}))
    assert len(said(capsys)) == 1 and len(graphs) == 2


@pytest.mark.parametrize("require", [False, True])
def test_a_failure_in_the_last_evaluation_is_told(fabric, capsys, require):
    keys = {"compile.backend": "some", "compile.require": require, "evaluate.every": "100 steps", "run.max_steps": 2}
    OK_FOR["graphs"] = 1
    if require:
        with pytest.raises(CompileError, match="OSError"):
            trained(fabric, "blocks", **keys)
    else:
        trained(fabric, "blocks", **keys)
        assert len(said(capsys)) == 1


# ---- a compiler that works ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope, dynamic",
    [
        ("whole", None),
        ("blocks", False),
        *(pytest.param(s, d, marks=pytest.mark.slow) for s, d in (("whole", True), ("whole", False), ("blocks", True))),
    ],
)
def test_compiled_by_autograd_alone_no_bit_changes(fabric, capsys, scope, dynamic):
    """A ragged epoch, so two shapes, and evaluations in between."""
    eager = trained(fabric, "none", Blocks(50))
    compiled = trained(fabric, scope, Blocks(50), **{"compile.backend": "some", "compile.dynamic": dynamic})
    assert_same(eager, compiled)
    assert said(capsys) == [] and compiled.compilation.active
    # three blocks share what is made of one
    assert 2 <= len(graphs) <= 4


def test_a_network_of_torchs_own_modules_is_compiled(fabric):
    """nn.Sequential, whose forward torch would rather leave alone."""
    task = Regression(48, dropout=0.3, batch_norm=True)
    eager = trained(fabric, "none", task)
    assert_same(eager, trained(fabric, "whole", task, **{"compile.backend": "some", "compile.require": True}))
    assert graphs
    named = {"compile.backend": "some", "compile.require": True, "compile.blocks": ["BatchNorm1d", "Linear"]}
    assert_same(eager, trained(fabric, "blocks", task, **named))


@pytest.mark.parametrize("scope", ["whole", "blocks"])
def test_activation_checkpointing_lies_inside_the_graph(fabric, scope):
    """The backward's graph computes each block's tanh again, where it would have been kept; no bit changes."""

    def run(scope: str, classes: list[str]) -> tuple[State, list[int]]:
        graphs.clear()
        changes = {"compile.scope": scope, "compile.backend": "backwards", "compile.require": True}
        made = config(**changes, **{"batch.accumulate": 3, "run.max_steps": 2})
        made.fabric.activation_checkpointing = classes
        state = fit(fabric, Blocks(norm=nn.LayerNorm), made)
        calls = [[node.target for node in graph.graph.nodes] for graph in graphs]
        return state, [targets.count(torch.ops.aten.tanh.default) for targets in calls]

    (eager, _), (compiled, again) = run("none", ["Block"]), run(scope, ["Block"])
    assert run(scope, [])[1] == [0]
    assert again == [3 if scope == "whole" else 1]
    for name, value in eager.module.state_dict().items():
        assert torch.equal(value, compiled.module.state_dict()[name]), name


def test_parameters_frozen_and_thawed_on_the_way(fabric):
    class Freezer:
        def on_update_end(self, state: State, metrics: dict) -> None:
            state.module.first.weight.requires_grad_(state.counters.window % 3 != 1)

    def run(scope: str) -> State:
        fabric._callbacks[:] = [Freezer()]
        state = trained(fabric, scope, **{"compile.backend": "some"})
        fabric._callbacks.clear()
        return state

    eager = run("none")
    for scope in ("whole", "blocks"):
        compiled = run(scope)
        assert compiled.compilation.active
        assert_same(eager, compiled)


def test_inductor_and_eager_agree(fabric, tmp_path):
    """Losses of 24 updates and an evaluation, to 1e-4; without dropout, whose random numbers inductor draws its way."""

    class Smooth(Blocks):
        def network(self) -> nn.Module:
            made = super().network()
            for block in made.blocks:
                block.dropout.p = 0.0
            return made

    changes = {"optim.lr": 1e-2, "run.log_every_n_steps": 1, "evaluate.every": "100 steps"}
    changes |= {"evaluate.micro_batch_size": 23, "compile.require": True}
    eager = fit(fabric, Smooth(), config(**changes), tmp_path / "eager")
    compiled = fit(fabric, Smooth(), config(**changes, **{"compile.scope": "blocks"}), tmp_path / "compiled")
    assert compiled.compilation.graphs["Block"] > 0
    losses = [column(tmp_path / name, "train/loss") for name in ("eager", "compiled")]
    assert len(losses[0]) == 24 and losses[1] == pytest.approx(losses[0], abs=1e-4, rel=1e-4)
    last = [state.history.evaluations[-1]["val/loss"] for state in (eager, compiled)]
    assert last[1] == pytest.approx(last[0], abs=1e-4, rel=1e-4)
    assert losses[0] != losses[1], "they round differently: something was compiled"


def column(folder: Path, name: str) -> list[float]:
    with open(folder / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"blocks": ["Block"]}, ("compile.blocks", "scope blocks")),
        ({"scope": "whole", "blocks": ["Block"]}, ("compile.blocks", "scope blocks")),
        ({"scope": "blocks", "blocks": []}, ("compile.blocks", "leave it out")),
        (
            {"scope": "whole", "backend": "aot_eager", "mode": "max-autotune"},
            ("compile.mode", "max-autotune", "inductor"),
        ),
    ],
)
def test_refusals_before_anything_is_built(changes, words):
    made = config(**{f"compile.{key}": value for key, value in changes.items()})
    with pytest.raises(InputError) as caught:
        check(made)
    assert all(word in str(caught.value) for word in words)


def test_refusals_of_the_network(fabric):
    recomputed = config(**{"compile.scope": "whole", "fabric.activation_checkpointing": ["Block"]})
    with pytest.raises(InputError, match=r"activation_checkpointing: Block has a BatchNorm1d, whose running"):
        State(fabric, Blocks(), recomputed)
    with pytest.raises(InputError, match=r"compile\.backend: torch has no inductr; it has .*inductor"):
        trained(fabric, "whole", **{"compile.backend": "inductr"})
    with pytest.raises(InputError, match=r"compile\.blocks: the network has no Blok; it has BatchNorm1d, Block"):
        trained(fabric, "blocks", **{"compile.blocks": ["Blok"]})
    with pytest.raises(InputError, match=r"compile\.scope: Regression names no blocks; .* or whole"):
        trained(fabric, "blocks", Regression())
