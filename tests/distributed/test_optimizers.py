"""Muon, Lookahead, adaptive clipping and SAM make the updates of one process."""

from __future__ import annotations

import pytest
import torch
from launches import QUICK, results

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
CASES = {"ddp": 4, "fsdp": 3, "tensor_parallel": 3}


@pytest.mark.parametrize("strategy", [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK)) for k in CASES])
def test_optimizers_are_those_of_one_process(trained, strategy):
    (one,) = results(trained("single").parent, "single", "optimizers")
    ranks = results(trained(strategy, controls=True).parent, strategy, "optimizers")
    for found in ranks:
        assert len(found) == CASES[strategy]
        for case, weights in found.items():
            assert weights.keys() == one[case].keys()
            for name, value in weights.items():
                torch.testing.assert_close(value, one[case][name], rtol=0, atol=1e-10, msg=f"{case} {name}")
    assert any("slow" in name for name in one["muon"])
    assert not torch.equal(one["muon"]["head.weight"], one["all matrices"]["head.weight"])
