"""The freezing strategies: scripted metrics and probes give exact epochs of unfreezing, warm-up and rollback."""

from __future__ import annotations

import json
import math
import re
import tempfile

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fabric_trainer.command import load
from fabric_trainer.config import (
    AdaptiveFreezeConfig,
    AdvancedFreezeConfig,
    Config,
    EarlyGradualFreezeConfig,
    FixedFreezeConfig,
    FreezeConfig,
    GradientGuidedFreezeConfig,
    ProgressiveFreezeConfig,
)
from fabric_trainer.errors import InputError
from fabric_trainer.freeze_guided import dependencies
from fabric_trainer.freeze_plans import Action, Plan, Reading, Unit, make_plan

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
    assert unfrozen(plan("adaptive"), [0.5, math.nan, math.nan]) == {2: ["layer4"]}
    assert unfrozen(plan("adaptive"), [math.nan, 0.5, 0.5, 0.5]) == {3: ["layer4"]}


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


@pytest.mark.parametrize(
    "strategy", ["none", "fixed", "adaptive", "progressive", "early_gradual", "gradient_guided", "advanced"]
)
def test_an_epoch_counts_once(strategy):
    """Correction: the original's hook and callback both advance it, so that patience and warm-up run twice as fast."""
    machine = plan(strategy)
    machine.on_epoch(0.5, 0, ())
    for epoch in (0, -1):
        with pytest.raises(ValueError, match=f"once per epoch: epoch {epoch} comes after 0"):
            machine.on_epoch(0.5, epoch, ())
    machine.on_epoch(0.5, 1, ())


# ---- early_gradual --------------------------------------------------------------------------------------------------

R2PLUS1D = {"layer4.1": 14_162_432, "layer4.0": 9_333_092, "layer3.1": 3_542_272, "layer3.0": 2_332_464}
R2PLUS1D |= {"layer2": 1_470_360, "layer1": 444_032, "stem": 15_473}  # 31,300,125 in all, half of it 15,650,062.5


def test_early_gradual_on_r2plus1d_18():
    """In the given order, here from the head down: layer4.1 is 45.2%, with layer4.0 75.1%, past the half."""
    assert sum(R2PLUS1D.values()) == 31_300_125
    units = [Unit(name, size) for name, size in R2PLUS1D.items()]
    machine = plan("early_gradual", units)
    assert unfrozen(machine, 10) == {1: ["layer4.1"], 2: ["layer4.0"]}
    assert machine.frozen == {"layer3.1", "layer3.0", "layer2", "layer1", "stem"}
    swapped = [units[1], units[0], *units[2:]]  # the original's order in a layer: 29.8%, then 75.1%
    assert unfrozen(plan("early_gradual", swapped), 10) == {1: ["layer4.0"], 2: ["layer4.1"]}


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"target": 1.0, "from_epoch": 0}, {0: ["layer4"], 1: ["layer3"], 2: ["layer2"], 3: ["layer1"], 4: ["stem"]}),
        ({"per_epoch": 2}, {1: ["layer4", "layer3"], 2: ["layer2", "layer1"]}),  # 40%, then 80%
        ({"per_epoch": 2, "target": 0.4}, {1: ["layer4", "layer3"]}),  # exactly the target is enough
        ({"per_epoch": 9, "from_epoch": 3}, {3: LAYERS}),
    ],
)
def test_early_gradual_with_equal_units(keys, expected):
    machine = plan("early_gradual", early_gradual=EarlyGradualFreezeConfig(**keys))
    assert unfrozen(machine, 10) == expected


# ---- gradient_guided ------------------------------------------------------------------------------------------------


def reading(mean: float = 0.0, sign: int = 1, activation: float = 0.0, variance: float = 0.0) -> Reading:
    return Reading((mean,), (variance,), (sign,), activation)


def guided(**keys) -> Plan:
    return plan("gradient_guided", gradient_guided=GradientGuidedFreezeConfig(**keys))


GRADIENTS = {"layer4": 0.02, "layer3": 0.03, "layer2": 0.005, "layer1": 0.011, "stem": 0.0}
PROBE = [{name: reading(mean) for name, mean in GRADIENTS.items()}]


def test_gradient_guided_in_time():
    """Epochs 0 and 1 sample, 2 and 3 are patience: layer3 with the largest gradient at the end of 4, layer4 of 7 and
    layer1 of 10. layer2 with 0.005 and the stem are below 0.01.

    Correction: the original measures nothing (frozen parameters get no gradient), so nothing is ever unfrozen. Its
    fallback, that the most important unit is unfrozen when none is above the threshold, can't be reached and is left
    out: a threshold that stops nothing would be none. A note says what the largest was.
    """
    machine = guided()
    assert machine.probes == 4
    actions = {epoch: machine.on_epoch(None, epoch, PROBE) for epoch in range(14)}
    assert {e: a.unfreeze for e, a in actions.items() if a.unfreeze} == {
        4: ("layer3",),
        7: ("layer4",),
        10: ("layer1",),
    }
    assert {e: a.notes for e, a in actions.items() if a.notes and not a.unfreeze} == {
        13: ("nothing unfrozen: layer2 has the largest mean gradient, 0.005, not above 0.01",)
    }
    assert machine.frozen == {"layer2", "stem"}


def test_gradient_guided_warm_up():
    """Unfrozen at the end of epoch 4: 0.1 + 0.9 e / 3 for e = 0, 1, 2 in epochs 5, 6, 7, then the whole rate."""
    machine, shares = guided(), {}
    for epoch in range(10):
        shares[epoch] = machine.share("layer3")
        machine.on_epoch(None, epoch, PROBE)
    assert [shares[epoch] for epoch in (3, 4)] == [0.0, 0.0]
    assert [shares[epoch] for epoch in range(5, 10)] == pytest.approx([0.1, 0.4, 0.7, 1.0, 1.0])


def test_gradient_guided_takes_several_at_once_in_descending_order():
    machine = guided(sampling_epochs=0, patience=0, per_epoch=2)
    assert machine.on_epoch(None, 0, PROBE).unfreeze == ("layer3", "layer4")
    assert machine.on_epoch(None, 1, PROBE).unfreeze == ("layer1",)


def test_importance_is_the_mean_over_this_epochs_batches_and_tensors():
    """layer4: the batches' means over two tensors are 0.02 and 0.04, in all 0.03; layer3 0.0299. What the epoch before
    measured is forgotten. A unit that trains is not measured any more, and a gradient that overflowed not counted."""
    machine = guided(sampling_epochs=1, patience=0)
    machine.on_epoch(None, 0, [{"layer3": reading(9.0)}])
    tensors = [Reading((0.01, 0.03), (0, 0), (1, 1), 0), Reading((0.06, 0.02), (0, 0), (1, 1), 0)]
    overflow = {"layer3": reading(math.inf), "layer4": reading(math.nan)}
    probe = [{"layer4": tensors[0], "layer3": reading(0.0299)}, overflow, {"layer4": tensors[1]}]
    assert machine.on_epoch(None, 1, probe).unfreeze == ("layer4",)
    assert machine.importance == pytest.approx({"layer4": 0.03, "layer3": 0.0299})
    machine.on_epoch(None, 2, probe)
    assert "layer4" not in machine.importance


# ---- advanced -------------------------------------------------------------------------------------------------------


def advanced(units=UNITS, **keys) -> Plan:
    return plan("advanced", units, advanced=AdvancedFreezeConfig(**keys))


def flipping(**gradients: float) -> list[dict[str, Reading]]:
    """Two batches whose gradients point opposite ways."""
    return [{name: reading(mean, sign) for name, mean in gradients.items()} for sign in (1, -1)]


def run(machine: Plan, metrics, probe=()) -> dict[int, Action]:
    """{epoch: what its end did}, where that was anything."""
    actions = {epoch: machine.on_epoch(metric, epoch, probe) for epoch, metric in enumerate(metrics)}
    return {epoch: action for epoch, action in actions.items() if action != Action()}


RISING = [0.5 + 0.1 * i for i in range(20)]


def test_the_score():
    """Two batches: m (1 + v) is 0.1, then 0.2 x 2 = 0.4; I is 0.1, then 0.9 x 0.1 + 0.1 x 0.4 = 0.13. The sign turned
    once, the activations' mean is 1.5: 0.4 x 0.13 + 0.3 x 1.5 + 0.2 x 1 = 0.702. Smoothed once: 0.3 x 0.702."""
    machine = advanced()
    first, second = reading(0.1, 1, activation=1.0), reading(0.2, -1, activation=2.0, variance=1.0)
    machine.on_epoch(0.5, 0, [{"layer4": first}, {"layer4": second}])
    assert machine.score("layer4") == pytest.approx(0.702)
    assert machine.smooth["layer4"] == pytest.approx(0.2106)
    machine.on_epoch(0.5, 1, [])
    assert machine.smooth["layer4"] == pytest.approx(0.7 * 0.2106 + 0.3 * 0.702)


@pytest.mark.parametrize("momentum, expected", [(0.0, 5.0), (0.5, 3.0), (0.9, 1.4)])
def test_momentum_smooths_a_spike(momentum, expected):
    """1, then 5: mu + (1 - mu) 5."""
    machine = advanced(momentum=momentum)
    machine.on_epoch(0.5, 0, [{"layer4": reading(1.0)}, {"layer4": reading(5.0)}])
    assert machine.statistics["layer4"].gradient == pytest.approx(expected)


def test_flips_are_per_tensor_and_activations_of_the_last_ten_batches():
    """Signs 1, -1, -1, 0 of the first tensor change twice, those of the second never: a potential of (2 + 0) / 2."""
    machine = advanced()
    signs = [1, -1, -1, 0] + [0] * 10
    probe = [{"stem": Reading((0, 0), (0, 0), (sign, 1), float(i))} for i, sign in enumerate(signs)]
    machine.on_epoch(0.5, 0, probe)
    assert machine.statistics["stem"].potential == 1.0
    assert machine.statistics["stem"].activation == sum(range(4, 14)) / 10


@pytest.mark.parametrize(
    "epoch, history, unit, expected",
    [
        (0, [0.5], "stem", 0.002),  # depth 0
        (0, [0.5], "layer4", 0.0028),  # x (1 + 0.4)
        (25, [0.5], "stem", 0.001),  # x (1 - 25 / 50)
        (40, [0.5], "stem", 0.001),  # never below a half
        (10, [0.5, 0.52], "layer2", 0.002 * 0.8 * 1.2 * 1.2),  # rose by 0.02
        (10, [0.5, 0.505], "layer2", 0.002 * 0.8 * 1.2),
        (10, [0.5, 0.49], "layer2", 0.002 * 0.8 * 1.2 * 0.8),  # fell by 0.01
    ],
)
def test_the_threshold(epoch, history, unit, expected):
    machine = advanced()
    machine.history = history
    assert machine.threshold(unit, epoch) == pytest.approx(expected)


def test_advanced_in_time():
    """Patience holds epochs 0 and 1. At the end of 2 layer3 has the largest gradient, and with it the best score. It
    builds on layer2 and layer1: 0.1 x 0.5 more for them, so that at the end of 5 layer2 (0.4 x 0.03 + 0.05 = 0.062 and
    flips) is before layer4 (0.016 and as many flips), which comes at the end of 8. Without dependencies layer4 is next.
    """
    probe = flipping(layer4=0.04, layer3=0.05, layer2=0.03)
    expected = {2: ("layer3",), 5: ("layer2",), 8: ("layer4",)}
    machine = advanced()
    assert {e: a.unfreeze for e, a in run(machine, RISING[:5], probe).items()} == {2: ("layer3",)}
    assert machine.score("layer2") == pytest.approx(0.4 * 0.03 + 0.2 * 9 + 0.1 * 0.5)  # ten batches: nine flips
    assert {e: a.unfreeze for e, a in run(advanced(), RISING[:12], probe).items()} == expected
    plain = run(advanced(dependencies=False), RISING[:12], probe)
    assert {e: a.unfreeze for e, a in plain.items()} == {2: ("layer3",), 5: ("layer4",), 8: ("layer2",)}


@pytest.mark.parametrize(
    "name, shares",
    [
        # a block: max(2, 3 - 1) epochs, 0.1 + 0.9 k / 2; then 1 - 0.1 x depth 4
        ("layer4", [0.1, 0.55, 0.6, 0.6]),
        ("layer1", [0.1, 0.55, 0.9, 0.9]),
        # a convolution: 3 + 1 epochs, 0.05^(1 - k / 4); then 1 - 0
        ("stem", [0.05, 0.05**0.75, 0.05**0.5, 0.05**0.25, 1.0, 1.0]),
        # anything else: 3 epochs, 0.1 + 0.9 k / 3; then at least a half, at depth 7
        ("head", [0.1, 0.4, 0.7, 0.5, 0.5]),
    ],
)
def test_warm_up_by_kind(name, shares):
    """Correction: a convolution's warm-up grew as 0.05 x 1.5^progress in the original, to 0.075 at most, and then
    jumped to 1."""
    machine = advanced([*UNITS, Unit("head", 10, "other", 7.0)], patience=0, analysis_window=0)
    machine.on_epoch(0.5, 0, flipping(**{name: 0.1}))
    assert machine.unfrozen == [name]
    seen = []
    for epoch in range(1, len(shares) + 1):
        seen.append(machine.share(name))
        machine.on_epoch(0.5 + 0.1 * epoch, epoch, ())
    assert seen == pytest.approx(shares)


@pytest.mark.parametrize(
    "probe",
    [
        flipping(layer4=0.001),  # gradient importance must exceed half of 0.002
        [{"layer4": reading(5.0, activation=5.0)}] * 2,  # its sign never changes
        [],
    ],
)
def test_every_criterion_must_hold(probe):
    assert run(advanced(emergency_epoch=None), RISING, probe) == {}


def test_one_gradient_above_the_bounds_is_enough():
    probe = flipping(layer4=0.00101)
    assert run(advanced(emergency_epoch=None), RISING[:3], probe)[2].unfreeze == ("layer4",)


def test_a_neighbour_in_warm_up_holds_a_unit_back():
    """layer4.1 warms up for two epochs, 1 and 2. layer3.1, at a distance of 1, need not wait (4.1 - 3.1 is a little
    less in floating point). layer4.0, at 0.1, has to till the end of 2, and, at 0.9 from layer3.1, till that of 3."""
    units = [Unit(f"layer{n}.{i}", 10, "sub_block", n + i / 10) for n, i in ((4, 1), (4, 0), (3, 1), (3, 0))]
    machine = advanced(units, patience=0, analysis_window=0, dependencies=False)
    probe = flipping(**{"layer4.1": 0.4, "layer4.0": 0.3, "layer3.1": 0.2})
    actions = {e: a.unfreeze for e, a in run(machine, RISING[:4], probe).items()}
    assert actions == {0: ("layer4.1",), 1: ("layer3.1",), 3: ("layer4.0",)}


def test_what_builds_on_what():
    """The original's layers and sub-blocks overlap; units here don't. A block builds on the two before it on the way
    from the input, a sub-block on the one."""
    assert dependencies(UNITS) == {
        "stem": [],
        "layer1": ["stem"],
        "layer2": ["stem", "layer1"],
        "layer3": ["layer1", "layer2"],
        "layer4": ["layer2", "layer3"],
    }
    parts = [Unit("b.1", 1, "sub_block", 2.1), Unit("b.0", 1, "sub_block", 2.0), Unit("a", 1, "block", 1.0)]
    assert dependencies(parts) == {"a": [], "b.0": ["a"], "b.1": ["b.0"]}
    assert dependencies([Unit("last", 1), Unit("first", 1)]) == {"first": [], "last": ["first"]}


# ---- rollback -------------------------------------------------------------------------------------------------------

EAGER = {"patience": 0, "analysis_window": 0}  # a unit after every epoch: layer4, layer3, layer2
STEPS = flipping(layer4=0.3, layer3=0.2, layer2=0.1)
FALLING = [0.5, 0.6, 0.58, 0.55]  # two declines in a row, at the ends of epochs 2 and 3


@pytest.mark.parametrize("restore", [False, True])
def test_rollback_to_the_best_epoch(restore):
    """Trained were in epoch 0 nothing, in 1 (0.6) layer4, in 2 layer3 too, in 3 layer2 too. At the end of 3 the second
    decline freezes all but layer4, whose warm-up is where it was in epoch 1.

    Corrections: the original takes snapshots from the third epoch on, and would go back to epoch 2, which had layer3;
    and it never brings weights back.
    """
    machine = advanced(**EAGER, restore_weights=restore)
    actions = run(machine, FALLING, STEPS)
    assert [actions[epoch].unfreeze for epoch in range(3)] == [("layer4",), ("layer3",), ("layer2",)]
    weights = ", weights restored" if restore else ""
    note = f"layer3 frozen again, layer2 frozen again{weights} (the metric fell 2 times: back to epoch 1)"
    assert actions[3] == Action(freeze=("layer3", "layer2"), restore=restore, notes=(note,))
    assert machine.frozen == set(LAYERS) - {"layer4"}
    assert machine.share("layer4") == 0.1 and machine.share("layer3") == 0.0


@pytest.mark.parametrize("restore, epoch", [(False, 4), (True, 1)])
def test_a_second_rollback(restore, epoch):
    """0.59, 0.57, 0.54 in epochs 4, 5 and 6. Where the weights went on from epoch 3, the best is looked for among the
    epochs since: 4. Where they were brought back, the best is still epoch 1, and its weights are the ones kept."""
    actions = run(advanced(**EAGER, restore_weights=restore), [*FALLING, 0.59, 0.57, 0.54], STEPS)
    assert [(e, a.freeze) for e, a in actions.items() if a.freeze] == [
        (3, ("layer3", "layer2")),
        (6, ("layer3", "layer2")),
    ]
    assert f"back to epoch {epoch})" in actions[6].notes[0]


@pytest.mark.parametrize(
    "metrics",
    [
        [0.5, 0.6, 0.58, 0.59, 0.57],  # the declines are not in a row
        [0.5, 0.6, 0.5995, 0.599],  # not by 0.001
        [0.6, 0.59, 0.58],  # the first decline that counts is at the third evaluation
        [0.6, None, 0.59, math.nan, 0.58],  # nor does an epoch without an evaluation count
    ],
)
def test_no_rollback(metrics):
    assert all(not action.freeze for action in run(advanced(**EAGER), metrics, STEPS).values())


def test_rollback_that_would_change_nothing_is_none():
    assert run(advanced(emergency_epoch=None), FALLING) == {}
    restored = run(advanced(emergency_epoch=None, restore_weights=True), FALLING)
    assert restored == {3: Action(restore=True, notes=("weights restored (the metric fell 2 times: back to epoch 1)",))}


def test_rollback_can_be_left_out():
    assert all(not a.freeze for a in run(advanced(**EAGER, rollback_patience=None), FALLING, STEPS).values())


def test_patience_starts_again_after_a_rollback():
    """Correction: in the original a unit frozen again may be unfrozen at the end of the very next epoch. Here layer4,
    unfrozen at the end of 2, frozen at that of 6 by the declines of 5 and 6, waits for epochs 7 and 8."""
    script = [0.5, 0.6, 0.9, 0.85, 0.86, 0.84, 0.8, 0.81, 0.82, 0.83]
    actions = run(advanced(emergency_epoch=None), script, flipping(layer4=0.1))
    assert {e: (a.unfreeze, a.freeze) for e, a in actions.items()} == {
        2: (("layer4",), ()),
        6: ((), ("layer4",)),
        9: (("layer4",), ()),
    }


def test_declines_are_counted_anew_after_a_rollback():
    machine = advanced(emergency_epoch=None, restore_weights=True)
    assert list(run(machine, [*FALLING, 0.54, 0.53, 0.52, 0.51])) == [3, 5, 7]


def test_a_warm_up_counts_an_epoch_without_an_evaluation():
    machine = advanced(**EAGER)
    machine.on_epoch(None, 0, flipping(layer4=0.1))
    assert machine.share("layer4") == 0.1
    machine.on_epoch(None, 1, ())
    assert machine.share("layer4") == pytest.approx(0.55)


# ---- emergency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metrics, keys, epoch",
    [
        ([0.5] * 10, {}, 2),  # three evaluations, no gain
        ([0.5, 0.5, 0.5049], {}, 2),  # 0.0049 of 0.005
        ([0.5, 0.6, 0.6, 0.6], {}, 3),  # over epochs 0 to 2 it gained 0.1, over 1 to 3 nothing
        (RISING, {}, 4),  # it rises, but nothing trains at the end of epoch 4
        (RISING, {"emergency_epoch": 7}, 7),
        ([0.5] * 10, {"emergency_patience": 5}, 4),  # six evaluations would be one too late
        ([0.5] * 10, {"patience": 3}, 3),
        ([None] * 10, {}, 4),
    ],
)
def test_emergency(metrics, keys, epoch):
    """The original never calls it. Here, at the end of an epoch in which patience is over and nothing trains."""
    actions = run(advanced(**keys), metrics)
    assert list(actions) == [epoch]
    note = "layer4 unfrozen (in an emergency: nothing else trains)"
    assert actions[epoch] == Action(unfreeze=("layer4",), notes=(note,))


def test_no_emergency_when_told_so():
    assert run(advanced(emergency_epoch=None), [0.5] * 20) == {}


def test_emergency_warm_up():
    """Six epochs: 0.01 + 0.99 k / 6; then 1 - 0.1 x 4."""
    machine, shares = advanced(), []
    for epoch in range(10):
        machine.on_epoch(0.5, epoch, ())
        shares.append(machine.share("layer4"))
    assert shares[:2] == [0.0, 0.0]
    assert shares[2:] == pytest.approx([0.01, 0.175, 0.34, 0.505, 0.67, 0.835, 0.6, 0.6])


def test_emergency_takes_the_deepest_sub_blocks():
    """layer4.1 is deepest; with readings, the better of the block's two; a third comes from the block below."""
    units = [Unit(f"layer{n}.{i}", 10, "sub_block", n + i / 10) for n, i in ((3, 0), (3, 1), (4, 0), (4, 1))]
    units += [Unit("neck", 10, "block", 9.0)]
    assert run(advanced(units), [0.5] * 3)[2].unfreeze == ("layer4.1",)
    still = [{"layer4.0": reading(activation=1.0), "layer3.0": reading(activation=9.0)}]
    assert run(advanced(units), [0.5] * 3, still)[2].unfreeze == ("layer4.0",)
    three = run(advanced(units, emergency_units=3), [0.5] * 3)
    assert three[2].unfreeze == ("layer4.1", "layer4.0", "layer3.1")


# ---- checkpoints ----------------------------------------------------------------------------------------------------

EVERY = {
    "none": {},
    "fixed": {"fixed": FixedFreezeConfig(phase1_epochs=4)},
    "schedule": {"schedule": {0: [], 3: ["layer4"]}},
    "adaptive": {},
    "progressive": {"progressive": ProgressiveFreezeConfig(interval=2)},
    "early_gradual": {},
    "gradient_guided": {"gradient_guided": GradientGuidedFreezeConfig(patience=1, per_epoch=2)},
    "advanced": {"advanced": AdvancedFreezeConfig(patience=0, analysis_window=1, per_epoch=2)},
    "advanced with weights": {"advanced": AdvancedFreezeConfig(**EAGER, restore_weights=True)},
}
METRICS = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([None, math.nan]))
PROBES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.builds(
                Reading,
                st.tuples(*[st.floats(0, 0.1)] * 2),
                st.tuples(*[st.floats(0, 0.1)] * 2),
                st.tuples(*[st.sampled_from([-1, 0, 1])] * 2),
                st.floats(0, 0.1),
            )
            for name in LAYERS
        },
    ),
    max_size=2,
)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=30, deadline=None)
@example(script=[(metric, STEPS) for metric in [*FALLING, 0.59, 0.57, 0.54, 0.53, 0.52, 0.51]])
@given(script=st.lists(st.tuples(METRICS, PROBES), min_size=1, max_size=12))
def test_a_state_read_back_at_every_epoch_goes_on_the_same(name, script):
    strategy = name.partition(" ")[0]
    machine, resumed = plan(strategy, **EVERY[name]), plan(strategy, **EVERY[name])
    frozen = set(machine.frozen)
    for epoch, (metric, probe) in enumerate(script):
        fresh = plan(strategy, **EVERY[name])
        fresh.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        resumed = fresh
        action = machine.on_epoch(metric, epoch, probe)
        assert resumed.on_epoch(metric, epoch, probe) == action
        # what an action does is what the machine then says, for units there are
        assert set(action.unfreeze) <= frozen and not set(action.freeze) & frozen
        assert set(action.freeze) <= set(LAYERS) and not set(action.freeze) & set(action.unfreeze)
        frozen = (frozen - set(action.unfreeze)) | set(action.freeze)
        assert machine.frozen == resumed.frozen == frozen
        assert set(machine.warmups) <= set(LAYERS) - frozen
        for unit in LAYERS:
            share = machine.share(unit)
            assert share == resumed.share(unit)
            assert 0 < share <= 1 or (share == 0 and unit in frozen)


def test_a_state_is_its_own():
    machine = advanced(**EAGER)
    run(machine, FALLING[:3], STEPS)
    saved = machine.state_dict()
    before = json.dumps(saved)
    machine.on_epoch(0.7, 3, STEPS)
    assert json.dumps(saved) == before


def test_a_state_of_something_else_is_refused():
    saved = plan("adaptive").state_dict()
    with pytest.raises(InputError, match=r"freeze\.strategy is progressive, the checkpoint's run has adaptive"):
        plan("progressive").load_state_dict(saved)
    with pytest.raises(InputError, match=r"freeze\.units are layer3, layer4; the checkpoint's run has layer4, layer3"):
        plan("adaptive", [UNITS[1], UNITS[0]]).load_state_dict(saved)


# ---- configuration --------------------------------------------------------------------------------------------------


def config(text: str) -> Config:
    base = {"run": {"max_steps": 5}, "checkpoint": {"monitor": "val/loss"}, "freeze": {"strategy": "advanced"}}
    for key, value in yaml.safe_load(text).items():
        base[key] = {**base.get(key, {}), **value}
    return load_text(yaml.dump(base))


def load_text(text: str) -> Config:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load(file.name)


@pytest.mark.parametrize(
    "text, named",
    [
        ("checkpoint: {monitor: null}", "freeze.strategy: advanced follows freeze.monitor or checkpoint.monitor"),
        ("freeze: {strategy: schedule}", "freeze.strategy: schedule and freeze.schedule"),
        ("freeze: {schedule: {0: [a]}}", "freeze.strategy: schedule and freeze.schedule"),
        ("freeze: {strategy: schedule, schedule: {5: [a]}}", "freeze.schedule must start at step 0"),
        ("freeze: {strategy: schedule, schedule: {0: [], -5: [a]}}", "freeze.schedule must start at step 0"),
        ("freeze: {units: []}", "freeze.units must name patterns"),
        ("freeze: {units: {a: []}}", "freeze.units must name patterns"),
        ("freeze: {lr: 0}", "freeze.lr must be above 0, not 0"),
        ("freeze: {lr_decay: -1}", "freeze.lr_decay must be above 0, not -1"),
        ("freeze: {fixed: {phase1_epochs: 0}}", "freeze.fixed.phase1_epochs must be at least 1, not 0"),
        ("freeze: {adaptive: {min_improvement: .nan}}", "freeze.adaptive.min_improvement must be at least 0, not nan"),
        (
            "freeze: {early_gradual: {target: 1.5}}",
            "freeze.early_gradual.target must be above 0 and at most 1, not 1.5",
        ),
        ("freeze: {gradient_guided: {probes: 0}}", "freeze.gradient_guided.probes must be at least 1, not 0"),
        ("freeze: {advanced: {probes: 1}}", "freeze.advanced.probes must be at least 2, not 1"),
        ("freeze: {advanced: {momentum: 1}}", "freeze.advanced.momentum must be at least 0 and below 1, not 1"),
        (
            "freeze: {monitor: val/top5, advanced: {restore_weights: true}}",
            "which is val/loss (min): freeze.monitor and",
        ),
        ("freeze: {mode: max, advanced: {restore_weights: true}}", "which is val/loss (min): freeze.monitor and"),
        (
            "{checkpoint: {top_k: 0}, freeze: {advanced: {restore_weights: true}}}",
            "checkpoint.top_k must be at least 1",
        ),
        ("freeze: {advanced: {rollback_patience: 0}}", "freeze.advanced.rollback_patience must be at least 1, not 0"),
    ],
)
def test_wrong_keys_are_named(text, named):
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        config(text)
    assert "\n" not in str(caught.value)


def test_right_keys_are_taken():
    assert config("freeze: {monitor: val/accuracy, mode: max, units: {top: ['layer4.*']}}").freeze.mode == "max"
    assert config("freeze: {advanced: {rollback_patience: null, emergency_epoch: null}}").freeze.strategy == "advanced"
    assert config("freeze: {mode: min, advanced: {restore_weights: true}}").freeze.advanced.restore_weights
    schedule = config("freeze: {strategy: schedule, schedule: {0: [], 500: [layer4]}}").freeze.schedule
    assert schedule == {0: [], 500: ["layer4"]}
