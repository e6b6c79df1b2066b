"""Under every strategy the updates are those of one process, and a checkpoint of each continues under each other."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launches import CONTROLLED, results, run_worker
from lightning.fabric.utilities.seed import seed_everything
from systems import LARGER, STRATEGIES, Masked

from fabric_trainer.checkpoint import load

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
OTHERS = [name for name in STRATEGIES if name != "single"]
TREES = ("model", "ema")


def tolerance(*strategies: str) -> float:
    """float64 where the strategy takes it; DeepSpeed keeps float32."""
    return 1e-6 if any(name.startswith("deepspeed") for name in strategies) else 1e-10


def checkpoint_of(folder: Path, step: int | None = None, run: str = "run") -> dict[str, Any]:
    return load(folder / run / "checkpoints" / ("last.pt" if step is None else f"step-{step:08d}.pt"))


def assert_same_state(a: dict[str, Any], b: dict[str, Any], bound: float) -> None:
    """Weights, averages, moments and counters of two checkpoints."""
    first, second = ({tree: c[tree] for tree in TREES} | c["averages"] for c in (a, b))
    assert first.keys() == second.keys() == {*TREES, "0.99", "power_0.1"}
    for tree, values in first.items():
        assert values.keys() == second[tree].keys()
        for name, value in values.items():
            other = second[tree][name].double()
            torch.testing.assert_close(value.double(), other, rtol=0, atol=bound, msg=f"{tree} {name}")
    moments, others = a["optimizer"]["state"], b["optimizer"]["state"]
    assert moments.keys() == others.keys()
    for name, values in moments.items():
        assert values.keys() == others[name].keys()
        for key, value in values.items():
            other = torch.as_tensor(others[name][key])
            torch.testing.assert_close(value.double(), other.double(), rtol=0, atol=bound, msg=f"{name} {key}")
    for counter in ("window", "step", "samples", "skipped", "empty"):
        assert a["counters"][counter] == b["counters"][counter]


def logged(folder: Path, run: str = "run") -> list[dict[str, float]]:
    """The rows of metrics.csv that an update has: losses, norm and rates by step."""
    with open(folder / run / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    wanted = ("step", "train/loss", "train/abs", "grad_norm", "lr/decay", "lr/no_decay")
    return [{key: float(row[key]) for key in wanted} for row in rows]


def assert_same_log(a: list[dict[str, float]], b: list[dict[str, float]], bound: float) -> None:
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for row, other in zip(a, b, strict=True):
        assert row == pytest.approx(other, abs=bound, rel=bound)


def counted(folder: Path, strategy: str, job: str = "train") -> list[int]:
    """The indices of the samples that counted, over all data-parallel ranks, sorted."""
    ranks = speakers(strategy, results(folder.parent, strategy, job))
    return sorted(index for found in ranks for forward in found["seen"] for index in forward)


def speakers(strategy: str, ranks: list[Any]) -> list[Any]:
    """One of the ranks that see the same data: two that share layers do."""
    return ranks[::2] if strategy in ("tensor_parallel", "fsdp x tp") else ranks


# ---- ten updates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def test_ten_updates_are_those_of_one_process(trained, strategy):
    """Ragged windows, one of them with padding alone on a rank, weights of 0, noise of the samples' own, clipping,
    warm-up, weight decay and EMA; the logged losses, gradient norms and learning rates too."""
    one, here, bound = trained("single"), trained(strategy), tolerance(strategy)
    whole = checkpoint_of(one)
    assert whole["counters"]["step"] == 10 and whole["counters"]["window"] > 8, "two ragged ends of an epoch"
    assert_same_state(whole, checkpoint_of(here), bound)
    assert_same_log(logged(one), logged(here), bound)
    assert any(row["grad_norm"] > 0.5 for row in logged(one)), "some are clipped"
    assert counted(one, "single") == counted(here, strategy)


def test_the_gradient_collectives_are_those_that_the_algorithm_needs(trained):
    """Of one update of three micro-batches on each of two ranks, beside one for the agreement on the host."""
    found = {}
    for strategy in OTHERS:
        trained(strategy)
        counts = results(trained(strategy).parent, strategy, "collectives")[0]
        found[strategy] = (
            counts.get("all_reduce", 0) + counts.get("reduce_scatter", 0) - 1,
            counts.get("all_gather", 0),
        )
    assert found["ddp"] == (1, 0), "one bucket, on the last micro-batch"
    # three units: one scatter each on the last micro-batch, one sum for the norm; blocks are gathered for the
    # forward and the backward of each micro-batch, the root once
    assert found["fsdp"] == (3 + 1, 3 * (2 * 2 + 1))
    # two blocks: an activation in the forward, a gradient in the backward of six micro-batches, and the norm
    assert found["tensor_parallel"] == (2 * 2 * 6 + 1, 0)
    # gradients once, norms of two groups; the two groups' weights are gathered
    assert found["deepspeed1"] == (1 + 2, 2)
    # gradients of each of three micro-batches
    assert found["deepspeed2"] == (3 + 2, 2)
    assert found["deepspeed3"][0] == 3 + 2


@pytest.mark.parametrize("strategy", CONTROLLED)
def test_all_ranks_end_early_together_with_the_best_weights(trained, strategy):
    ends_early(trained("single"), trained(strategy, controls=True), tolerance(strategy))


def ends_early(one: Path, here: Path, bound: float) -> None:
    """By the metric and by the time, of which rank 0 alone takes notice; and what is in the network and the files."""
    best, last = (load(here / "ends/checkpoints" / f"{name}.pt") for name in ("best", "last"))
    assert last["counters"]["step"] == 3 > best["counters"]["step"]
    for rank in results(here.parent, here.name, "ends"):
        assert (rank["early"], rank["timed"], rank["complete"], rank["stopped"]) == (3, 5, False, 0)
        for tree in TREES:
            for name, value in best[tree].items():
                assert torch.equal(rank["restored"][tree][name], value), f"{tree} {name}"
            assert any(not torch.equal(value, last[tree][name]) for name, value in best[tree].items())
    if not here.name.startswith("deepspeed"):
        rows, others = norms(one), norms(here)
        assert len(rows) == len(others) == 3 and rows[0].keys() == {"embed", "head", "blocks", "norm"}
        for row, other in zip(rows, others, strict=True):
            assert other == pytest.approx(row, rel=bound)


def norms(folder: Path) -> list[dict[str, float]]:
    """Of the modules' gradients, by update."""
    with open(folder / "ends/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [
        {k.removeprefix("grad_norm/"): float(v) for k, v in row.items() if k.startswith("grad_norm/")} for row in rows
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_activation_checkpointing_changes_no_bit(trained, strategy):
    """Three updates with dropout on, without and with the blocks' activations computed again."""
    for ranks in results(trained(strategy).parent, strategy, "recompute"):
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


@pytest.mark.parametrize("strategy", ["fsdp", "tensor_parallel", "deepspeed1", "deepspeed3"])
def test_a_checkpoint_is_gathered_one_tensor_at_a_time(trained, strategy):
    """Bytes of whole tensors alive at once: rank 0 has its copy beside, the others have one parameter."""
    for rank in results(trained(strategy).parent, strategy, "memory"):
        assert 0 < rank["most"] <= rank["largest"] < rank["all"] / 3
        assert rank["live"] == 0


def test_gradients_are_exchanged_after_fabrics_context_said_nothing(trained):
    """Fabric's own FSDP2 control leaves the exchange off after no_backward_sync(enabled=False)."""
    for rank in results(trained("fsdp").parent, "fsdp", "sync_after_accumulation"):
        assert rank["gradients"] and all(rank["gradients"])


@pytest.mark.parametrize("strategy", CONTROLLED)
def test_averages_in_pieces_are_those_of_whole_weights_bit_for_bit(trained, strategy):
    assert_exact_averages(results(trained(strategy, controls=True).parent, strategy, "averages"))


def assert_exact_averages(ranks: list[Any]) -> None:
    """Beside torch.lerp of the same weights, gathered after each update; a snapshot has them too."""
    for rank in ranks:
        assert rank["updates"] == 6 and rank["collectives"] == 0
        assert rank["compared"] > 3 * 10 and rank["different"] == []
    assert ranks[0]["snapshots"] == [3, 6] and ranks[0]["saved"] == ["power_0.1"]


@pytest.mark.parametrize("strategy", CONTROLLED)
def test_the_finders_leave_no_trace(trained, strategy):
    """A run after both ends with the bits of one without: weights, averages, moments, data and dropout."""
    here = trained(strategy, controls=True)
    ranks = results(here.parent, strategy, "finders")
    whole, one = checkpoint_of(here), results(here.parent, "single", "finders")[0] if trained("single") else {}
    for tree in TREES:
        assert all(torch.equal(value, ranks[0]["taken"][tree][name]) for name, value in whole[tree].items()), tree
    for name, moments in whole["optimizer"]["state"].items():
        for key, value in moments.items():
            found = ranks[0]["taken"]["optimizer"]["state"][name][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found)), (name, key)
    assert whole["counters"] | {"seconds": 0} == ranks[0]["taken"]["counters"] | {"seconds": 0}
    for rank in ranks:
        assert rank["sweep"] == ranks[0]["sweep"] and rank["size"] == (3 if strategy == "ddp" else 5)
        first = min(len(rank["sweep"][0]), len(one["sweep"][0])) - 3  # what diverges, differs
        np.testing.assert_allclose(rank["sweep"][0][:first], one["sweep"][0][:first], rtol=1e-4)


def after_five(one: Path) -> list[int]:
    """What one process saw after its fifth update, sorted."""
    (rank,) = results(one.parent, "single", "train")
    forwards = -(-checkpoint_of(one, 5)["counters"]["samples"] // 2)  # of micro-batches of 2
    return sorted(index for forward in rank["seen"][forwards:] for index in forward)


@pytest.mark.slow
def test_a_network_built_without_memory_is_drawn_block_by_block(trained):
    """As one process draws it that calls the modules' reset_parameters() in the order of the blocks."""
    here = trained("fsdp")
    run_worker(here.parent, "fsdp", {"drawn": {}}, name="fsdp meta", fabric={"fsdp": {"meta_init": True}})
    seed_everything(42, verbose=False)
    network = Masked().network().double()
    blocks = list(network.blocks)
    seed_everything(42, verbose=False)
    for unit in (*blocks, network):
        for module in unit.modules():
            inside = unit is network and any(module is part for block in blocks for part in block.modules())
            if hasattr(module, "reset_parameters") and not inside:
                module.reset_parameters()
    for rank in results(here.parent, "fsdp meta", "drawn"):
        for name, value in network.state_dict().items():
            assert torch.equal(value, rank[name]), name


# ---- from each into each --------------------------------------------------------------------------------------------


def resumed(trained, target: str, sources: list[str]) -> None:
    """Launch the target once, on the checkpoints after five updates of all sources."""
    files = {source: str(trained(source) / "run/checkpoints/step-00000005.pt") for source in sources}
    here = trained(target)
    run_worker(here.parent, target, {"resume": {"sources": files}})
    ranks = results(here.parent, target, "resume")
    one = trained("single")
    for source in sources:
        bound = tolerance(source, target)
        saved = load(Path(files[source]))
        exact = 0.0 if tolerance(target) <= tolerance(source) else 1e-7  # float64 into DeepSpeed's float32
        assert_same_state(saved, ranks[0][source]["taken"], exact)
        run = f"from {source}"
        assert_same_state(checkpoint_of(one), checkpoint_of(here, run=run), max(bound, 1e-10))
        after = [row for row in logged(one) if row["step"] > 5]
        assert_same_log(after, [row for row in logged(here, run) if row["step"] > 5], 1e-6)
        ids = sorted(i for rank in speakers(target, ranks) for forward in rank[source]["seen"] for i in forward)
        assert ids == after_five(one)


RING = list(STRATEGIES)


@pytest.mark.parametrize("target", [*CONTROLLED[1:-1], "deepspeed3"])
def test_continues_what_one_process_and_the_strategy_before_it_saved(trained, target):
    resumed(trained, target, sorted({"single", RING[RING.index(target) - 1]}))


def test_one_process_continues_what_every_strategy_saved(trained):
    resumed(trained, "single", list(STRATEGIES))


@pytest.mark.slow
@pytest.mark.parametrize("target", [*STRATEGIES, *LARGER])
def test_every_pair(trained, target):
    resumed(trained, target, [*STRATEGIES, *LARGER])


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_rank_holds_of_a_hundred_million_parameters(tmp_path):
    """Weights, moments and averages in float32 after two updates, no gradients: 16 bytes a parameter where a rank has
    all, half of it where two ranks share; DDP keeps its gradients' buckets, 4 more. Prints the table of the docs."""
    sections: dict[str, Any] = {
        "task": {"args": {"width": 3600}},
        "run": {"max_steps": 2},
        "schedule": {"warmup": 0},
        "evaluate": {"every": "100 steps"},
        "ema": {"decay": 0.9, "power": []},
    }
    held = {}
    print("\n| strategy | held between updates, GB | largest resident size, GB |\n|---|---|---|")
    for strategy in STRATEGIES:
        name = f"{strategy} large"
        run_worker(tmp_path, strategy, {"footprint": {}}, name=name, precision="32-true", timeout=900, **sections)
        ranks = results(tmp_path, name, "footprint")
        assert ranks[0]["parameters"] > 100e6
        held[strategy] = max(rank["held"] for rank in ranks) / ranks[0]["parameters"]
        most = [max(rank[key] for rank in ranks) / 1e9 for key in ("held", "peak")]
        print(f"| {strategy} | {most[0]:.2f} | {most[1]:.2f} |")
    assert held["single"] == pytest.approx(16, rel=0.01)
    assert held["ddp"] == pytest.approx(20, rel=0.01)
    assert held["fsdp"] == pytest.approx(8, rel=0.01)
    for strategy in ("deepspeed1", "deepspeed2", "deepspeed3"):
        assert held[strategy] < held["ddp"], strategy
