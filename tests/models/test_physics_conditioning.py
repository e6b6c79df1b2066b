"""Test-time conditioning beside exhaustive search, closed forms and plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from fabric_trainer import checkpoint
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split, evaluate
from fabric_trainer.random import SampleRandom
from models.physics.conditioning import Reward, Scored, Search, Settings, Weights, channel_names, settings
from models.physics.evaluation import EvaluationNetwork, EvaluationStage
from models.physics.residual_stage import ResidualStage

MASS = {"reward": {"mass_field": "u"}}
LEAK = 0.25


def drawn(rows: int, seed: int = 3, first: int = 0) -> SampleRandom:
    return SampleRandom(seed, 0, torch.arange(first, first + rows))


def start(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, 2, generator=torch.Generator().manual_seed(seed))


def step(z: Tensor) -> Tensor:
    """Leaks mass, and bends."""
    return 0.9 * z + 0.2 * z.flip(1) - 0.1 * z * z + LEAK


def decode(z: Tensor) -> Tensor:
    """Eight points of one channel."""
    return z.flatten(1)[:, None, None]


def drift(z: Tensor, tau: Tensor) -> Tensor:
    return (tau[:, None, None] - 0.6) * z.tanh()


def search(given: dict[str, Any], rows: int, seed: int = 3, first: int = 0, **others: Any) -> Search:
    made = settings(MASS | given)
    return Search(made, Scored(made.reward, ["u"]), step, decode, drawn(rows, seed, first), **others)


# ---- the plain step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"candidates": 1}, {"candidates": 5}, {"candidates": 3, "beam_width": 2, "horizon": 3}]
)
def test_without_noise_it_is_the_plain_step_bit_for_bit(given):
    z = start(6)
    found = search({"steps": 2, **given}, 6)(z)
    assert torch.equal(found.z, torch.stack((step(z), step(step(z))), 1))
    assert torch.equal(found.reward, found.reward_plain)


def test_one_candidate_is_the_plain_step_whatever_the_noise():
    z = start(6)
    found = search({"candidates": 1, "sampler": {"noise_std": 0.5}}, 6)(z)
    assert torch.equal(found.z[:, 0], step(z)) and found.evaluations == 0


def test_of_equally_good_candidates_the_plain_one_is_taken():
    z = start(6)
    blind = search({"candidates": 8, "sampler": {"noise_std": 0.5}}, 6)
    found = replace(blind, decode=lambda z: torch.zeros(len(z), 1, 1, 1))(z)
    assert torch.equal(found.z[:, 0], step(z)) and found.evaluations == 8


def test_a_candidate_that_is_not_finite_is_never_taken():
    z = start(6)
    seen = search({"candidates": 4, "sampler": {"noise_std": 0.5}}, 6)
    good = (z, step(z))
    spoilt = replace(seen, decode=lambda x: decode(x if any(torch.equal(x, each) for each in good) else x * torch.nan))
    found = spoilt(z)
    assert torch.equal(found.z[:, 0], step(z)) and found.reward.isfinite().all() and found.evaluations == 4


# ---- closed forms -------------------------------------------------------------------------------------------------


def test_the_candidate_that_conserves_is_picked():
    """The drift at any tau but the plain prediction's takes away exactly what the step leaks."""
    z = torch.zeros(5, 4, 2)

    def mends(z: Tensor, tau: Tensor) -> Tensor:
        return torch.where(tau == 0.5, 0.0, -LEAK)[:, None, None].expand_as(z)

    found = search({"candidates": 2}, 5, correct=mends)(z)
    assert torch.equal(found.z[:, 0], z)
    assert torch.equal(found.reward, torch.zeros(5)) and torch.equal(found.reward_plain, torch.full((5,), -LEAK))


def test_noise_that_leaks_least_is_picked_and_is_the_samples_own():
    """From rest the step adds LEAK to all, so a candidate's loss is |LEAK + std x unit x mean of its noise|."""
    z, std, unit = torch.zeros(40, 4, 2), 0.4, 1.7
    found = search({"candidates": 6, "sampler": {"noise_std": std}}, 40, unit=unit)(z)
    noise = torch.stack([drawn(40).normal(f"ttc noise 0 {c}", 4, 2) for c in range(1, 6)], 1)
    noise = torch.cat((torch.zeros(40, 1, 4, 2), std * unit * noise), 1)
    losses = (LEAK + noise).mean((2, 3)).abs()
    torch.testing.assert_close(found.reward, -losses.min(1).values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.z[:, 0], LEAK + noise[torch.arange(40), losses.argmin(1)])
    assert len(losses.argmin(1).unique()) > 3, "samples choose for themselves"
    assert found.evaluations == 6


def test_with_one_step_ahead_the_reward_never_falls_and_more_candidates_never_hurt():
    z = start(60)
    before = None
    for candidates in (2, 4, 8):
        found = search({"candidates": candidates, "sampler": {"noise_std": 0.3}}, 60)(z)
        assert (found.reward >= found.reward_plain).all()
        assert before is None or (found.reward >= before).all()
        before = found.reward
    assert (found.reward > found.reward_plain).float().mean() > 0.9


def test_noise_in_units_or_absolute_and_its_schedule():
    z = torch.zeros(3, 4, 2)
    sampler = {"noise_std": 9.0, "noise_schedule": [0.2, 0.1]}
    for kind, unit in (("latent_change", 5.0), ("absolute", 1.0)):
        made = search({"sampler": {**sampler, "noise_unit": kind}}, 3, unit=5.0)
        for moment, std in ((0, 0.2), (1, 0.1), (2, 0.1)):
            noise = std * unit * drawn(3).normal(f"ttc noise {moment} 2", 4, 2)
            torch.testing.assert_close(made.candidate(z, moment, 2), noise)


def test_taus_are_uniform_in_their_range_and_the_plain_one_has_its_own():
    seen: list[Tensor] = []

    def correct(z: Tensor, tau: Tensor) -> Tensor:
        seen.append(tau)
        return torch.zeros_like(z)

    made = search({"sampler": {"tau_range": [0.2, 0.6]}}, 4000, correct=correct, tau=1.0)
    for number in (0, 1, 2):
        made.candidate(start(4000), 0, number)
    plain, one, two = seen
    assert torch.equal(plain, torch.ones(4000)) and not torch.equal(one, two)
    assert 0.2 <= one.min() < 0.201 and 0.599 < one.max() <= 0.6 and abs(one.mean() - 0.4) < 0.01


def test_the_terms_of_the_reward():
    before = torch.tensor([[[[1.0, 3.0]], [[2.0, -2.0]]]])
    now = torch.tensor([[[[-1.0, 2.0]], [[4.0, 1.0]]]])
    mass, momentum = abs(0.5 - 2.0), (1.5 + 2.5) / 2
    square = ((1 + 4 + 16 + 1) - (1 + 9 + 4 + 4)) / 4
    for weights, fields, expected in (
        ({"mass": 2.0}, {"mass_field": "rho"}, 2 * mass),
        ({"mass": 0.0, "momentum": 3.0}, {"momentum_field": ("rho", 1)}, 3 * momentum),
        ({"mass": 0.0, "energy": 1.0}, {"energy_field": "e"}, 2.5),
        ({"mass": 0.0, "energy": 1.0}, {}, square),
        ({"mass": 0.0, "penalty_negative": 4.0}, {"mass_field": 0}, 4 * 0.5),
        ({"mass": 1.0, "energy": 0.5}, {"mass_field": "rho", "energy_field": "e"}, mass + 0.5 * 2.5),
    ):
        scored = Scored(Reward(weights=Weights(**weights), **fields), ["rho", "e"])
        assert scored(before, now).item() == pytest.approx(-expected)
    grows = Scored(Reward(energy="growth", weights=Weights(mass=0, energy=1)), ["rho", "e"])
    assert grows(before, now).item() == pytest.approx(-square) and grows(now, before).item() == 0


# ---- the search ---------------------------------------------------------------------------------------------------


def exhaustive(z: Tensor, row: int, candidates: int, horizon: int, gamma: float, noise: float, seed: int) -> Tensor:
    """The first state of the best of all sequences of candidates, for one sample."""
    random, best = drawn(1, seed, row), (-math.inf, z)
    for sequence in product(range(candidates), repeat=horizon):
        state, total, states = z, 0.0, []
        for depth, number in enumerate(sequence):
            state = step(state)
            if number:
                state = state + noise * random.normal(f"ttc noise {depth} {number}", 4, 2)
            states.append(state)
            total -= gamma**depth * abs(decode(state).double().mean() - decode(z).double().mean()).item()
        best = max(best, (total, states[0]), key=lambda pair: pair[0])
    return best[1]


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    candidates=st.integers(1, 3),
    horizon=st.integers(1, 3),
    gamma=st.sampled_from([0.5, 1.0]),
    noise=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_a_beam_wide_enough_is_exhaustive_search(candidates, horizon, gamma, noise, seed):
    z = start(3, seed)
    given = {"candidates": candidates, "horizon": horizon, "beam_width": 27, "gamma": gamma}
    found = search(given | {"sampler": {"noise_std": noise}}, 3, seed)(z)
    for row in range(3):
        best = exhaustive(z[row : row + 1], row, candidates, horizon, gamma, noise, seed)
        torch.testing.assert_close(found.z[row : row + 1, 0], best)


@hypothesis_settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 7), width=st.integers(1, 4), horizon=st.integers(1, 3), steps=st.integers(1, 3))
def test_a_sample_has_the_same_states_in_any_batch(cut, width, horizon, steps):
    z = start(8)
    given = {"candidates": 3, "beam_width": width, "horizon": horizon, "steps": steps, "sampler": {"noise_std": 0.3}}
    whole = search(given, 8, correct=drift)(z)
    pieces = [
        search(given, len(z[rows]), first=rows.start, correct=drift)(z[rows]) for rows in (slice(0, cut), slice(cut, 8))
    ]
    assert torch.equal(whole.z, torch.cat([piece.z for piece in pieces]))
    assert torch.equal(whole.reward, torch.cat([piece.reward for piece in pieces]))
    assert {piece.evaluations for piece in pieces} == {whole.evaluations}


def test_the_originals_scoring_takes_one_candidate_for_all_and_depends_on_the_split():
    z = torch.zeros(8, 4, 2)
    given = {"candidates": 5, "sampler": {"noise_std": 0.4}, "scoring": "batch"}
    whole = search(given, 8)(z)
    noise = torch.stack([torch.zeros(8, 4, 2)] + [0.4 * drawn(8).normal(f"ttc noise 0 {c}", 4, 2) for c in range(1, 5)])
    chosen = (LEAK + noise).mean((2, 3)).abs().mean(1).argmin()
    torch.testing.assert_close(whole.z[:, 0], LEAK + noise[chosen])
    alone = [search(given, 1, first=row)(z[row : row + 1]).z for row in range(8)]
    assert not torch.equal(whole.z, torch.cat(alone))
    z[7] = torch.nan
    padded = search(given, 8, weight=torch.tensor([1.0] + [0.0] * 7))(z)
    assert torch.equal(padded.z[:1], alone[0]), "rows that pad have no say"


def test_what_was_not_looked_ahead_from_is_not_compared_with_what_was():
    """Rewards are penalties: the original's totals of sequences that end early lack some, and win."""
    z = torch.zeros(30, 4, 2)
    found = search({"candidates": 4, "beam_width": 2, "horizon": 2, "sampler": {"noise_std": 0.4}}, 30)(z)
    noise = torch.stack(
        [torch.zeros(30, 4, 2)] + [0.4 * drawn(30).normal(f"ttc noise 0 {c}", 4, 2) for c in range(1, 4)]
    )
    best_two = (LEAK + noise).mean((2, 3)).abs().topk(2, dim=0, largest=False).indices
    for row in range(30):
        firsts = LEAK + noise[best_two[:, row], row]
        assert any(torch.allclose(found.z[row, 0], first) for first in firsts)


# ---- the budget ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "evaluations"),
    [
        ({"candidates": 16, "beam_width": 5, "max_evaluations": 200}, 16),  # train_burgers_golden
        ({"candidates": 6, "beam_width": 2, "horizon": 2, "max_evaluations": 100}, 18),  # the two-task files
        ({"candidates": 6, "beam_width": 1, "horizon": 2}, 6),  # one sequence is kept: nothing to look ahead for
        ({"candidates": 6, "beam_width": 2, "horizon": 3}, 30),
        ({"candidates": 6, "beam_width": 2, "horizon": 2, "max_evaluations": 17}, 6 + 10),
        ({"candidates": 6, "beam_width": 2, "horizon": 2, "max_evaluations": 7}, 6),
        ({"candidates": 6, "max_evaluations": 4}, 4),
        ({"candidates": 6, "max_evaluations": 1}, 0),  # one candidate: the plain one
        ({"candidates": 6, "steps": 3, "max_evaluations": 14}, 14),
        ({"candidates": 6, "steps": 3, "max_evaluations": 13}, 12),
        ({"candidates": 4, "beam_width": 9, "horizon": 2}, 4 + 16),
    ],
)
def test_candidates_are_counted_and_never_above_the_budget(given, evaluations):
    decoded: list[int] = []

    def counted(z: Tensor) -> Tensor:
        decoded.append(len(z))
        return decode(z)

    made = replace(search({"sampler": {"noise_std": 0.3}, **given}, 7), decode=counted)
    steps = given.get("steps", 1)
    found = made(start(7))
    assert found.evaluations == evaluations <= given.get("max_evaluations", math.inf)
    assert found.z.shape == (7, steps, 4, 2)
    assert decoded == [7] * (
        1 + 2 * steps + evaluations
    )  # the start; and the states taken and the plain ones, to report


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidates": 0}, "task.args.ttc.candidates: 0 is no whole number of at least 1"),
        ({"steps": 1.5}, "task.args.ttc.steps: 1.5 is no whole number of at least 1"),
        ({"max_evaluations": True}, "task.args.ttc.max_evaluations: True is no whole number of at least 1"),
        ({"gamma": 0}, "task.args.ttc.gamma: 0 is no number above 0 and at most 1"),
        ({"gamma": "1"}, "task.args.ttc.gamma: '1' is no number above 0 and at most 1"),
        ({"scoring": "mean"}, "task.args.ttc.scoring: 'mean' is none of sample, batch"),
        ({"candidate": 3}, "task.args.ttc.candidate: no such key, only steps, candidates, beam_width"),
        ({"sampler": 3}, "task.args.ttc.sampler: 3 is no mapping of tau_range, noise_std, noise_schedule, noise_unit"),
        ({"sampler": {"noise": 3}}, "task.args.ttc.sampler.noise: no such key, only tau_range"),
        ({"sampler": {"noise_std": -1}}, "task.args.ttc.sampler.noise_std: -1 is no number at least 0"),
        ({"sampler": {"noise_schedule": [0.1, math.nan]}}, "task.args.ttc.sampler.noise_schedule: nan is no number"),
        ({"sampler": {"noise_unit": "rms"}}, "noise_unit: 'rms' is none of latent_change, absolute"),
        ({"sampler": {"tau_range": [0.9, 0.1]}}, "tau_range: [0.9, 0.1] is no [low, high] within 0 and 1"),
        ({"sampler": {"tau_range": [0, 2]}}, "tau_range: 2 is no number within 0 and 1"),
        ({"reward": {}}, "task.args.ttc.reward.mass_field: weights.mass 1.0 needs it: a channel's name or number"),
        (
            {"reward": {"weights": {"mass": 0, "momentum": 1}}},
            "task.args.ttc.reward.momentum_field: weights.momentum 1",
        ),
        ({"reward": {"weights": {"mass": 0}}}, "task.args.ttc.reward.weights: all are 0"),
        ({"reward": {"weights": {"mass": -2}}}, "task.args.ttc.reward.weights.mass: -2 is no number at least 0"),
        ({"reward": {"mass_field": "u", "energy": "loss"}}, "reward.energy: 'loss' is none of change, growth"),
        ({"residual_threshold": 0.35}, "task.args.ttc.residual_threshold: nothing read it in the original either"),
        ({"reward": {"critic": {"weight": 0.5}}}, "task.args.ttc.reward.critic: there is no learned critic"),
    ],
)
def test_wrong_settings_are_one_line(given, message):
    with pytest.raises(InputError) as error:
        settings({**MASS, **given})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_field_that_the_data_lacks_is_named_with_those_that_there_are():
    made = settings({"reward": {"mass_field": "rho", "energy_field": "e"}})
    with pytest.raises(InputError) as error:
        Scored(made.reward, channel_names("burgers1d", 1), "burgers1d")
    assert str(error.value) == "task.args.ttc.reward.mass_field: 'rho' is no channel of burgers1d; there is u (0)"
    with pytest.raises(InputError, match=r"mass_field: 2 is no channel of x; there is density \(0\), pressure \(1\)$"):
        Scored(Reward(mass_field=2), ["density", "pressure"], "x")


def test_names_of_channels():
    assert channel_names("reaction_diffusion2d", 2) == ["u", "v"]
    assert channel_names("compressible_ns1d", 3) == ["density", "pressure", "Vx"]
    assert channel_names("navier_stokes2d", 1) == ["u"] and channel_names("navier_stokes2d", 2) == ["0", "1"]


def test_the_originals_settings_are_taken(test_data):
    """All but what has no effect: what the translation leaves out."""
    kept = {"steps", "candidates", "beam_width", "horizon", "gamma", "max_evaluations", "sampler"}
    seen = 0
    for path in sorted((test_data / "fixtures" / "ups_configs").glob("*.yaml")):
        original = yaml.safe_load(path.read_text()).get("ttc")
        if original is None:
            continue
        reward = {
            name: original["reward"][name] for name in ("mass_field", "energy_field", "momentum_field", "weights")
        }
        made = settings({name: original[name] for name in kept & set(original)} | {"reward": reward})
        assert isinstance(made, Settings) and made.candidates == original["candidates"]
        assert list(made.sampler.tau_range) == original["sampler"]["tau_range"]
        assert made.reward.weights.energy == original["reward"]["weights"]["energy"]
        seen += 1
    assert seen >= 8


# ---- a system's steps ---------------------------------------------------------------------------------------------

STAGE: dict[str, Any] = {
    "tasks": ["burgers1d"],
    "made": {"burgers1d": {"nu": 0.01, "nx": 32, "frames": 7}},
    "samples": {"train": 6, "val": 2, "test": 5},
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 2},
    "operator": {"core": {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16},
}
WITH_DARCY = {"tasks": ["burgers1d", "darcy2d"], "made": STAGE["made"] | {"darcy2d": {"nx": 8}}}
WITH_DARCY["encoder"] = {"tokens": 8, "dim": 8, "patch": 2, "margin": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def prepared(root, ttc: dict[str, Any], **more: Any) -> tuple[EvaluationStage, EvaluationNetwork]:
    stage = EvaluationStage(**STAGE | more, ttc=MASS | ttc)
    stage.prepare(root)
    torch.manual_seed(0)
    network = stage.network().eval()
    torch.nn.init.normal_(network.operator.output_norm.weight, std=0.05)
    return stage, network


def measured(fabric, stage: EvaluationStage, network: EvaluationNetwork, size: int = 2) -> dict[str, Any]:
    return evaluate(fabric, stage, network, Split(fabric, stage, stage.dataset("test"), size))


def test_without_noise_the_figures_are_those_of_plain_steps(root, fabric):
    found = measured(fabric, *prepared(root, {"candidates": 3}))
    assert found["nrmse_ttc"] == found["nrmse_ttc_plain"] == pytest.approx(found["nrmse"], rel=1e-5)
    assert found["nrmse_physical_ttc"] == pytest.approx(found["nrmse_physical"], rel=1e-5)
    assert found["ttc_reward"] == found["ttc_reward_plain"] < 0 and found["ttc_evaluations"] == 3


def test_burgers_mass_is_kept_better_and_however_the_split_is_cut(root, fabric):
    """The equation keeps its mean exactly, the operator doesn't."""
    stage, network = prepared(root, {"candidates": 8, "sampler": {"noise_std": 1.0}})
    found = measured(fabric, stage, network)
    assert found["ttc_reward_plain"] < found["ttc_reward"] <= 0 and found["ttc_evaluations"] == 8
    assert found["nrmse_ttc"] != found["nrmse_ttc_plain"] == pytest.approx(found["nrmse"], rel=1e-5)
    for name, value in measured(fabric, stage, network, 5).items():
        if "ttc" in name:
            assert value == pytest.approx(found[name], rel=1e-4), name
    losses = []
    u = stage.sets["test"][0].tensor()
    with torch.no_grad():
        for before in u[:, :-1].flatten(0, 1).split(1):
            z = network.encode(before, 0)
            after = network.advance(before, z, network.step(z, 0), 0)
            losses.append((after.mean() - before.mean()).abs().item())
    assert found["ttc_reward_plain"] == pytest.approx(-sum(losses) / len(losses), rel=1e-3)


def test_steady_tasks_are_left_out(root, fabric):
    ttc = {"candidates": 2, "steps": 2, "sampler": {"noise_std": 0.5}}
    found = measured(fabric, *prepared(root, ttc, **WITH_DARCY), 3)
    assert "darcy2d/nrmse_ttc" not in found and found["ttc_evaluations"] == found["burgers1d/ttc_evaluations"] == 4
    assert found["nrmse_ttc"] == found["burgers1d/nrmse_ttc"]
    with pytest.raises(InputError, match=r"^task.args.ttc: darcy2d is steady"):
        prepared(root, ttc, **WITH_DARCY | {"tasks": ["darcy2d"], "made": {"darcy2d": {"nx": 8}}})


def test_a_systems_corrector_brings_candidates(root, fabric, tmp_path):
    """Plain predictions are corrected at the stage's tau, candidates at others."""
    stage = ResidualStage(**STAGE)
    stage.prepare(root)
    network = stage.network()
    torch.nn.init.normal_(network.corrector.network[4].weight, std=0.02)
    state = {"format": 1, "model": network.state_dict(), "ema": {}, "counters": {}, "config": {}}
    checkpoint.write(tmp_path / "residual.pt", state)
    sampler = {"sampler": {"tau_range": [0.0, 1.0]}}
    start = {"start": str(tmp_path / "residual.pt")}
    for tau in (1.0, 0.5):
        stage, network = prepared(root, sampler | {"candidates": 6}, corrector_tau=tau, **start)
        found = measured(fabric, stage, network)
        assert found["nrmse_ttc_plain"] == pytest.approx(found["nrmse"], rel=1e-5)
        assert found["ttc_reward"] > found["ttc_reward_plain"] and found["nrmse_ttc"] != found["nrmse_ttc_plain"]
        z = start_of(network, stage)
        torch.testing.assert_close(network.ahead(z, 0), network.step(z, 0) + network.corrector(network.step(z, 0), tau))


def start_of(network: EvaluationNetwork, stage: EvaluationStage) -> Tensor:
    return network.encode(stage.sets["test"][0].tensor()[:, 0], 0)


@pytest.mark.parametrize(
    ("ttc", "message"),
    [
        ({"reward": {"mass_field": "rho"}}, "mass_field: 'rho' is no channel of burgers1d; there is u (0)"),
        ({"steps": 9}, "task.args.ttc.steps: 9 are more than the 6 of burgers1d"),
    ],
)
def test_what_a_task_lacks_is_one_line(root, ttc, message):
    with pytest.raises(InputError) as error:
        prepared(root, ttc)
    assert message in str(error.value) and "\n" not in str(error.value)
