"""The freezing strategies: scripted metrics and probes give exact epochs of unfreezing, warm-up and rollback."""

from __future__ import annotations

import pytest

from fabric_trainer.config import AdaptiveFreezeConfig, FixedFreezeConfig, FreezeConfig, ProgressiveFreezeConfig
from fabric_trainer.errors import InputError
from fabric_trainer.freeze_plans import Plan, Unit, make_plan

LAYERS = ["layer4", "layer3", "layer2", "layer1", "stem"]
UNITS = [Unit(name, 10, "conv" if name == "stem" else "block", 4.0 - i) for i, name in enumerate(LAYERS)]


def plan(strategy: str, units=UNITS, **keys) -> Plan:
    return make_plan(FreezeConfig(strategy=strategy, **keys), units)


def unfrozen(machine: Plan, metrics) -> dict[int, list[str]]:
    """{epoch at whose end: the units unfrozen}, over a script of metrics or a number of epochs."""
    script = enumerate(metrics) if not isinstance(metrics, int) else ((epoch, None) for epoch in range(metrics))
    actions = {epoch: machine.on_epoch(metric, epoch, ()) for epoch, metric in script}
    return {epoch: list(action.unfreeze) for epoch, action in actions.items() if action.unfreeze}


def test_none_trains_everything():
    machine = plan("none")
    assert unfrozen(machine, 5) == {} and not machine.frozen and machine.share("layer4") == 1.0


# ---- fixed ----------------------------------------------------------------------------------------------------------


def test_fixed_freezes_every_unit_for_the_whole_run():
    """Correction: the original's fixed, without gradual_finetuning, freezes nothing."""
    machine = plan("fixed")
    assert unfrozen(machine, 30) == {}
    assert machine.frozen == set(LAYERS)
    assert [machine.share(name) for name in LAYERS] == [0.0] * 5


def test_two_phases():
    """Eight epochs, 0 to 7, with everything frozen; the ninth trains the last three layers."""
    machine = plan("fixed", fixed=FixedFreezeConfig(phase1_epochs=8))
    assert unfrozen(machine, 23) == {7: ["layer4", "layer3", "layer2"]}
    assert machine.frozen == {"layer1", "stem"}


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_the_second_phase_trains_as_many_units_as_asked(count):
    """Correction: never more than three in the original."""
    machine = plan("fixed", fixed=FixedFreezeConfig(phase1_epochs=1, unfreeze=count))
    assert unfrozen(machine, 3) == {0: LAYERS[:count]}


# ---- schedule -------------------------------------------------------------------------------------------------------


def test_a_schedule_is_a_function_of_the_step():
    machine = plan("schedule", schedule={2000: ["layer?"], 0: [], 700: ["layer4"], 500: ["layer[4]"]})
    assert machine.changes == (500, 2000)  # 700 changes nothing
    everything = set(LAYERS)
    assert machine.frozen == machine.frozen_at(0) == machine.frozen_at(499) == everything
    assert machine.frozen_at(500) == machine.frozen_at(1999) == everything - {"layer4"}
    assert machine.frozen_at(2000) == machine.frozen_at(10**9) == {"stem"}
    assert unfrozen(machine, 3) == {}


def test_a_schedule_may_freeze_again():
    machine = plan("schedule", schedule={0: ["*"], 10: ["stem"]})
    assert machine.frozen_at(9) == set() and machine.frozen_at(10) == set(LAYERS) - {"stem"}


def test_a_schedule_of_unknown_units_is_refused():
    with pytest.raises(InputError, match=r"freeze\.schedule 5: no unit fits layer9; there are layer4, layer3"):
        plan("schedule", schedule={0: [], 5: ["layer9"]})


# ---- adaptive -------------------------------------------------------------------------------------------------------


def test_adaptive_counts_epochs_without_improvement():
    """patience 2, min_improvement 0.005. 0.50 is the best; 0.503 gains 0.003 (bad 1), 0.5049 gains 0.0049 on 0.50
    (bad 2: layer4); 0.51 gains 0.01 (best); 0.40 and 0.40 are bad (layer3), 0.514 gains 0.004 (bad 1),
    0.513 is bad 2 (layer2)."""
    script = [0.50, 0.503, 0.5049, 0.51, 0.40, 0.40, 0.514, 0.513]
    assert unfrozen(plan("adaptive"), script) == {2: ["layer4"], 5: ["layer3"], 7: ["layer2"]}


def test_adaptive_unfreezes_all_in_order_and_then_nothing():
    machine = plan("adaptive")
    assert unfrozen(machine, [0.5] * 20) == {2: ["layer4"], 4: ["layer3"], 6: ["layer2"], 8: ["layer1"], 10: ["stem"]}
    assert not machine.frozen and [machine.share(name) for name in LAYERS] == [1.0] * 5


def test_adaptive_with_losses():
    """Correction: the original's best starts at 0, which a loss with its sign turned never reaches, so that units were
    unfrozen however much it fell. Here the first evaluation is the first best."""
    machine = plan("adaptive", adaptive=AdaptiveFreezeConfig(patience=2, min_improvement=0.005))
    assert unfrozen(machine, [-2.0, -1.9, -1.8, -1.7, -1.6, -1.5]) == {}
    assert unfrozen(plan("adaptive"), [-2.0, -2.1, -1.999]) == {2: ["layer4"]}


def test_an_epoch_without_an_evaluation_says_nothing():
    assert unfrozen(plan("adaptive"), [None, 0.5, None, 0.5, None, None, 0.5]) == {6: ["layer4"]}


def test_a_metric_that_is_not_a_number_is_no_improvement():
    assert unfrozen(plan("adaptive"), [0.5, float("nan"), float("nan")]) == {2: ["layer4"]}


# ---- progressive ----------------------------------------------------------------------------------------------------


def test_progressive_keeps_its_interval():
    """Corrections: the original unfreezes one after every epoch, whatever its configuration's 5, 10, 15 say, stops
    after four, and looks for conv1, so that the stem never trains."""
    expected = {4: ["layer4"], 9: ["layer3"], 14: ["layer2"], 19: ["layer1"], 24: ["stem"]}
    assert unfrozen(plan("progressive"), 40) == expected


def test_progressive_with_a_limit():
    machine = plan("progressive", progressive=ProgressiveFreezeConfig(interval=1, limit=4))
    assert unfrozen(machine, 10) == {0: ["layer4"], 1: ["layer3"], 2: ["layer2"], 3: ["layer1"]}


# ---- once per epoch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["none", "fixed", "adaptive", "progressive"])
def test_an_epoch_counts_once(strategy):
    """Correction: the original's hook and callback both advance it, so that patience and warm-up run twice as fast."""
    machine = plan(strategy)
    machine.on_epoch(0.5, 0, ())
    for epoch in (0, -1):
        with pytest.raises(ValueError, match=f"once per epoch: epoch {epoch} comes after 0"):
            machine.on_epoch(0.5, epoch, ())
    machine.on_epoch(0.5, 1, ())
