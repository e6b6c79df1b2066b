# ruff: noqa: E402  (imports after the path)
"""FSDP1 on two CPU processes: torch does it where it is told to, only Fabric's strategy is for GPUs alone.

This file is also what the processes run, around worker.py: it makes the strategy name the CPU, for tests alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]

import pytest
import torch
import warm
import yaml
from launches import AVERAGES, ending, results, run_worker
from systems import document
from test_every_strategy import (
    assert_exact_averages,
    assert_same_log,
    assert_same_state,
    checkpoint_of,
    counted,
    ends_early,
    logged,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fabric_trainer import fsdp1, strategies
from fabric_trainer.checkpoint import load

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]
FABRIC = {"strategy": "fsdp1", "precision": "32-true"}
BOUND = 1e-6  # FSDPPrecision has no float64
# weights stay gathered after a forward, in units by size; elements are clipped, and the largest is the norm
SHARDING = {"fsdp": {"sharding": "SHARD_GRAD_OP", "blocks": 500}}
CLIP = {"norm": None, "value": 0.05, "p": math.inf}
CASES = {"whole": {"rank": -1}, "nan": {"fault": "nan", "at": 4}}
QUIET = {"run": {"max_steps": 3}, "schedule": {"warmup": 0}, "evaluate": {"every": "100 steps"}}


class OnCpu(fsdp1.FlatStrategy):
    """What it does on a GPU, but for ``device_id``, of which Fabric hands over the index alone."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            module,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self._fsdp_kwargs,
        )


def configured(**sections: dict[str, Any]) -> dict[str, Any]:
    return document("fsdp", **sections | {"fabric": FABRIC | sections.get("fabric", {})})


def launch(folder: Path, jobs: dict[str, Any], **sections: dict[str, Any]) -> None:
    (folder / "fsdp1.yaml").write_text(yaml.safe_dump(configured(**sections)))
    command = [sys.executable, __file__, str(folder), "fsdp1", json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = warm.run(command, env=environment)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def here(trained) -> Path:
    """What one launch left, after the checkpoint of one process too."""
    one = trained("single")
    jobs: dict[str, Any] = {
        "train": {},
        "resume": {"sources": {"single": str(one / "run/checkpoints/step-00000005.pt")}},
        "recompute": {"config": configured(**QUIET, task={"args": {"dropout": 0.3}})},
        "memory": {"config": configured(**QUIET)},
        "averages": {"config": configured(**AVERAGES)},
        "ends": {"config": ending(configured())},
        "faulty": {"cases": CASES, "config": configured(fabric=SHARDING, clip=CLIP)},
    }
    launch(one.parent, jobs)
    return one.parent / "fsdp1"


def test_ten_updates_are_those_of_one_process(trained, here):
    """Clipped by the norm over all pieces, averaged on them, evaluated with both; parameters are cut in the middle."""
    one = trained("single")
    assert_same_state(checkpoint_of(one), checkpoint_of(here), BOUND)
    assert_same_log(logged(one), logged(here), BOUND)
    assert counted(one, "single") == counted(here, "fsdp1")


def test_all_ranks_end_early_together_with_the_best_weights(trained, here):
    ends_early(trained("single"), here, 1e-5)


def test_continues_what_one_process_saved(trained, here):
    one = trained("single")
    saved = load(one / "run/checkpoints/step-00000005.pt")
    assert_same_state(saved, results(here.parent, "fsdp1", "resume")[0]["single"]["taken"], 1e-7)
    assert_same_state(checkpoint_of(one), checkpoint_of(here, run="from single"), BOUND)


def test_one_process_continues_what_it_saved(trained, here, tmp_path):
    one, path = trained("single"), here / "run/checkpoints/step-00000005.pt"
    run_worker(tmp_path, "single", {"resume": {"sources": {"fsdp1": str(path)}}})
    assert_same_state(load(path), results(tmp_path, "single", "resume")[0]["fsdp1"]["taken"], 0.0)
    assert_same_state(checkpoint_of(one), checkpoint_of(tmp_path / "single", run="from fsdp1"), BOUND)


def test_activation_checkpointing_changes_no_bit(here):
    for ranks in results(here.parent, "fsdp1", "recompute"):
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


def test_a_checkpoint_is_gathered_one_tensor_at_a_time(here):
    for rank in results(here.parent, "fsdp1", "memory"):
        assert 0 < rank["most"] <= rank["largest"] < rank["all"] / 3
        assert rank["live"] == 0


def test_shards_of_the_optimizer_alone_and_clipping_by_value(here, tmp_path):
    run_worker(tmp_path, "single", {"faulty": {"cases": {"whole": {}}, "config": document("single", clip=CLIP)}})
    one = tmp_path / "single"
    assert_same_state(checkpoint_of(one, run="whole"), checkpoint_of(here, run="whole"), BOUND)
    assert_same_log(logged(one, "whole"), logged(here, "whole"), BOUND)


def test_on_one_device_nothing_is_sharded(trained, tmp_path):
    launch(tmp_path, {"train": {}}, fabric={"devices": 1})
    assert_same_state(checkpoint_of(trained("single")), checkpoint_of(tmp_path / "fsdp1"), BOUND)


def test_averages_in_pieces_are_those_of_whole_weights_bit_for_bit(here):
    assert_exact_averages(results(here.parent, "fsdp1", "averages"))


def test_nan_on_one_rank_is_left_out_by_both(here):
    for rank in results(here.parent, "fsdp1", "faulty"):
        assert rank["nan"]["skipped"] == 1 and rank["nan"]["step"] == 10
    assert all(value.isfinite().all() for value in checkpoint_of(here, run="nan")["ema"].values())


def main() -> None:
    import worker  # sets what a process of its own needs

    fsdp1.FlatStrategy = OnCpu
    strategies.TABLE["fsdp1"] = replace(strategies.TABLE["fsdp1"], cpu=True)
    worker.main()


if __name__ == "__main__":
    main()
