"""A compiler that fails on one rank of two: all end in eager, together."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_fsdp1_cpu
import torch
from launches import COMPILING, compiled, results, run_worker

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
LINE = "compile: the compiler failed on rank 1, everything runs in eager from here on: OSError: no such instruction"


def check(folder: Path, strategy: str) -> None:
    """The weights are the eager run's, bit for bit, on all ranks, and rank 0 has said so in a line."""
    for rank, found in enumerate(results(folder, strategy, "compiled")):
        eager, required = found.pop("eager"), found.pop("required")
        assert eager["graphs"] == 0 and eager["said"] == []
        assert required["error"] == "compile.require: the compiler failed on rank 1: OSError: no such instruction"
        for case, end in found.items():
            for name, value in eager["weights"].items():
                assert torch.equal(value, end["weights"][name]), f"{case}: {name} on rank {rank}"
            assert end["graphs"] > 0
            fails = case in ("forward", "backward", "later") and rank == 0
            assert end["said"] == [LINE] * fails, case


@pytest.mark.parametrize("strategy", COMPILING)
def test_a_compiler_that_fails_on_one_rank(trained, strategy):
    """In the forward's graph or in the backward's, at first use or at a second shape."""
    check(trained(strategy).parent, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tensor_parallel", "deepspeed1", "fsdp x tp"])
def test_and_under_the_other_strategies(tmp_path, strategy):
    job = compiled(strategy)
    if strategy != "deepspeed1":  # ranks that share layers have no way back later on, and can't recompute in a graph
        job["cases"] = {name: keys for name, keys in job["cases"].items() if name not in ("later", "recomputed")}
    run_worker(tmp_path, strategy, {"compiled": job})
    check(tmp_path, strategy)


@pytest.mark.slow
def test_and_under_fsdp1(tmp_path):
    test_fsdp1_cpu.launch(tmp_path, {"compiled": compiled("fsdp", fabric=test_fsdp1_cpu.FABRIC)})
    check(tmp_path, "fsdp1")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tensor_parallel", "deepspeed1"])
@pytest.mark.parametrize("scope", ["whole", "blocks"])
def test_inductor_and_eager_agree(tmp_path, strategy, scope):
    """After five updates without dropout, in float32."""
    job = compiled(strategy, precision="32-true")
    job["config"]["task"] = {"path": "systems.Masked", "args": {}}
    job["cases"] = {"eager": {}, "inductor": {"scope": scope, "require": True}}
    run_worker(tmp_path, strategy, {"compiled": job})
    for found in results(tmp_path, strategy, "compiled"):
        for name, value in found["eager"]["weights"].items():
            torch.testing.assert_close(found["inductor"]["weights"][name], value, rtol=0, atol=1e-4)
