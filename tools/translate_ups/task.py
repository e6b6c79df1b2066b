"""The task of a stage: what the original's keys of data, networks, losses and test-time conditioning are."""

from __future__ import annotations

from typing import Any

from data import ups
from fabric_trainer.errors import InputError
from models.physics.conditioning import CHANNELS
from tools.translate_ups.rules import (
    EVALUATION,
    OPERATOR,
    Asked,
    Kind,
    Ours,
    Rule,
    Said,
    number,
    only,
    text,
    to,
    where,
)

# ---- data and networks --------------------------------------------------------------------------------------------


def tasks(value: list[str], asked: Asked) -> Said:
    for task in value:
        ups.check_task(task, "data.task")
    return {"task.args.tasks": value}


def sampling(value: str, asked: Asked) -> Said:
    return {"task.args.sampling": value} if len(asked.get("data.task", ())) > 1 else "there is one task"


def latent_dim(value: int, asked: Asked) -> Said:
    return "latent.dim stands in its place" if asked.get("latent.dim") else {"task.args.encoder.dim": value}


CORES = {  # what operator.pdet may have
    "pdet_unet": ("hidden_dim", "depths", "group_size", "num_heads", "mlp_ratio", "dropout"),
    "pdet_stack": ("hidden_dim", "depth", "num_heads", "attention_type", "group_size", "qk_norm", "mlp_ratio",
                   "dropout", "drop_path", "use_activation_checkpoint"),
}  # fmt: skip


def core(name: str, kind: Kind) -> Rule:
    def say(value: Any, asked: Asked) -> Said:
        architecture = asked.get("operator.architecture_type")
        has = name in CORES.get(architecture, (name,))
        return {f"task.args.operator.core.{name}": value} if has else f"{architecture} has none"

    return Rule(kind, say)


def corrector(value: int, asked: Asked) -> Said:
    return {"task.args.corrector.hidden": value} if asked.stage != OPERATOR else f"{OPERATOR} has no corrector"


# ---- losses -------------------------------------------------------------------------------------------------------


def spectral(value: float, asked: Asked) -> Said:
    """Of the operator over features, as there; the corrector's is one of energies, there as here."""
    form = {"task.args.spectral": "original"} if asked.stage == OPERATOR else {}
    return {"task.args.spectral_weight": value} | form


def rollout(value: float, asked: Asked) -> Said:
    if asked.get("training.rollout_horizon") < 2:
        return "training.rollout_horizon of 1 leaves no states to roll out to"
    return {"task.args.rollout_weight": value}


def inverse(name: str, default: Any = None) -> Rule:
    """Every n-th update is, on average, every update at an n-th of the weight; so is the cap."""

    def say(value: float, asked: Asked) -> Said:
        every = asked.get("training.inverse_loss_frequency")
        remark = f"/ {every} and at every update, for at one of {every}" if every > 1 else ""
        return {f"task.args.{name}": value / every}, remark

    return only((OPERATOR,), where("training.use_inverse_losses", Rule(number, say, default)))


_INVERSE = {
    "lambda_inv_enc": "inverse_encoding",
    "lambda_inv_dec": "inverse_decoding",
    "inverse_loss_max_weight": "inverse_cap",
}


def inverse_losses(value: bool, asked: Asked) -> Said:
    return _weights(asked) if value else "there are no inverse losses"


def frequency(value: int, asked: Asked) -> Said:
    if value < 1:
        raise InputError(f"training.inverse_loss_frequency: must be at least 1, not {value}")
    return _weights(asked)


def _weights(asked: Asked) -> Ours:
    every, given = asked.get("training.inverse_loss_frequency"), asked.values
    return {f"task.args.{ours}": given[f"training.{name}"] / every for name, ours in _INVERSE.items()
            if f"training.{name}" in given}  # fmt: skip


def sampled(value: bool, asked: Asked) -> Said:
    """Without sampling the original compares whole grids."""
    if not value:
        return {"task.args.queries": EVERY_POINT}, "every point of a grid"
    return {"task.args.queries": asked.get("training.query_sampling.num_queries")}


EVERY_POINT = 1 << 20


def query(rule: Rule) -> Rule:
    return only((OPERATOR,), where("training.query_sampling.enabled", rule))


def stratified(value: str, asked: Asked) -> Said:
    if value not in ("uniform", "stratified"):
        raise InputError(f"training.query_sampling.strategy: {value!r} is neither uniform nor stratified")
    return {"task.args.stratified": value == "stratified"}


PRIORS = ("divergence", "conservation", "boundary", "positivity", "latent_norm", "latent_diversity")


def prior(name: str) -> Rule:
    return of_priors(to(f"task.args.priors.{name}", number))


def of_priors(rule: Rule) -> Rule:
    return only((OPERATOR,), where("training.physics_priors.enabled", rule))


def priors(value: bool, asked: Asked) -> Said:
    if not value:
        return "there are no priors"
    section = "training.physics_priors"
    return {f"task.args.priors.{name}": asked.get(f"{section}.lambda_{name}", 0.0) for name in PRIORS}


def boundary(name: str, kind: Kind) -> Rule:
    def say(value: Any, asked: Asked) -> Said:
        if not asked.get("training.physics_priors.lambda_boundary"):
            return "training.physics_priors.lambda_boundary is 0"
        return {f"task.args.boundary.{name}": value}

    return of_priors(Rule(kind, say))


# ---- corrector and student ----------------------------------------------------------------------------------------


def tau(value: Any, asked: Asked) -> Said:
    """Of the corrector's levels; uniform is Beta(1, 1)."""
    section = "training.tau_distribution"
    kind = asked.get(f"{section}.type", "beta")
    if kind not in ("beta", "uniform"):
        raise InputError(f"{section}.type: {kind!r} is neither beta nor uniform")
    ours = [1.0, 1.0] if kind == "uniform" else [asked.get(f"{section}.{name}", 1.0) for name in ("alpha", "beta")]
    return "the distribution is uniform" if kind == "uniform" and value != kind else {"task.args.tau": ours}


def taus(value: int, asked: Asked) -> Said:
    schedule = asked.own("tau_schedule")
    return f"{schedule} stands in its place" if asked.get(schedule) else {"task.args.tau_schedule": [value]}


# ---- evaluation and test-time conditioning --------------------------------------------------------------------------


def evaluated(value: bool, asked: Asked) -> Said:
    if asked.alone:
        return "the stage is asked for"
    return {"stages.evaluation": True} if value else "nothing is measured"


def split(value: str, asked: Asked) -> Said:
    return {"--split": value} if asked.alone else f"a pipeline measures test{'' if value == 'test' else ' alone'}"


def ttc(name: str, kind: Kind) -> Rule:
    return conditioned(to(f"task.args.ttc.{name}", kind))


def conditioned(rule: Rule) -> Rule:
    return only((EVALUATION,), where("ttc.enabled", rule))


def conditioning(value: bool, asked: Asked) -> Said:
    """With noise of the original's sizes; the first channel is the mass where none is named."""
    if not value:
        return "nothing is conditioned"
    return {"task.args.ttc.sampler.noise_unit": "absolute", "task.args.ttc.reward.mass_field": 0}


def channel(name: str, instead: str) -> Rule:
    """A field of the reward: the channel of that name where every task has it, else ``instead``."""

    def say(value: str, asked: Asked) -> Said:
        lacking = [task for task in asked.get("data.task", ()) if value not in CHANNELS.get(task, ("u",))]
        if not lacking:
            return {f"task.args.ttc.reward.{name}": value}
        return f"{lacking[0]} has no {value}: {instead}"

    return conditioned(Rule(text, say))


def momentum(value: list[str], asked: Asked) -> Said:
    for task in asked.get("data.task", ()):
        if lacking := [name for name in value if name not in CHANNELS.get(task, ("u",))]:
            return f"{task} has no {lacking[0]}"
    return {"task.args.ttc.reward.momentum_field": value}
