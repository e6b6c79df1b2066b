"""Every key of the original's configuration files, and its rule.

``stages.*`` stands for each stage; ``….*`` at the end for all that is below.
"""

from __future__ import annotations

from functools import cache

from tools.translate_ups.rules import (
    DISTILL,
    EVALUATION,
    OPERATOR,
    RESIDUAL,
    STAGES,
    Kind,
    Rule,
    anything,
    nothing,
    number,
    only,
    several,
    text,
    to,
    training,
    truth,
    unless_own,
    where,
    whole,
)
from tools.translate_ups.task import (
    boundary,
    channel,
    conditioned,
    conditioning,
    core,
    corrector,
    evaluated,
    frequency,
    inverse,
    inverse_losses,
    latent_dim,
    momentum,
    of_priors,
    prior,
    priors,
    query,
    rollout,
    sampled,
    sampling,
    spectral,
    split,
    stratified,
    tasks,
    tau,
    taus,
    ttc,
)
from tools.translate_ups.training import (
    CLIP,
    EMA,
    OPTIMIZER,
    PATIENCE,
    SCHEDULER,
    accumulate,
    amp,
    amp_dtype,
    batch_size,
    compile_mode,
    compiled,
    devices,
    distill_batch_size,
    epochs,
    no_graphs,
    offload,
    own,
    profiler,
    run_name,
    sharded,
    shared,
    wandb,
)

_FETCHED = nothing("a script of the original fetches them; here the files have to be in data.root")
_LOADER = nothing("the loader sees to it by itself")
_UNREAD = nothing("nothing in the original reads it")
_SYSTEM = nothing("the system's own decoder gives the channels of the data, from latents of latent.dim")

DATA = {
    "data.task": Rule(several(text), tasks),
    "data.split": nothing("stages learn from train, are evaluated on val and measured on evaluation.split"),
    "data.root": to("data.root", text),
    "data.patch_size": to("task.args.encoder.patch", whole),
    "data.field_name": nothing("all channels of a file are read"),
    "data.task_sampling.strategy": Rule(text, sampling),
    "data.download.*": _FETCHED,
    "training.time_stride": to("task.args.time_stride", whole, 1),
    "training.rollout_horizon": to("task.args.rollout_horizon", whole, 1),
    "training.latent_cache_dir": to("task.args.latent_cache_dir", text),
    "training.latent_cache_dtype": to("task.args.latent_cache_dtype", text, "float16"),
    "training.use_preloaded_cache": nothing("kept latents are always mapped into memory"),
    "training.use_parallel_encoding": nothing("latents are made once, before training"),
    "training.num_workers": to("data.num_workers", whole),
    "training.prefetch_factor": _LOADER,
    "training.pin_memory": _LOADER,
}

NETWORKS = {
    "latent.dim": to("task.args.encoder.dim", whole),
    "latent.tokens": to("task.args.encoder.tokens", whole),
    "operator.latent_dim": Rule(whole, latent_dim),
    "operator.architecture_type": to("task.args.operator.architecture", text, "pdet_unet"),
    "operator.pdet.input_dim": nothing("it is latent.dim"),
    "operator.pdet.hidden_dim": core("hidden_dim", whole),
    "operator.pdet.depths": core("depths", several(whole)),
    "operator.pdet.depth": core("depth", whole),
    "operator.pdet.group_size": core("group_size", whole),
    "operator.pdet.num_heads": core("num_heads", whole),
    "operator.pdet.attention_type": core("attention_type", text),
    "operator.pdet.qk_norm": core("qk_norm", truth),
    "operator.pdet.mlp_ratio": core("mlp_ratio", number),
    "operator.pdet.drop_path": core("drop_path", number),
    "operator.pdet.dropout": core("dropout", number),
    "operator.pdet.use_activation_checkpoint": core("use_activation_checkpoint", truth),
    "training.dt": to("task.args.dt", number, 0.1),
    "diffusion.latent_dim": nothing("it is latent.dim"),
    "diffusion.hidden_dim": Rule(whole, corrector),
    "ttc.decoder.hidden_dim": to("task.args.decoder.hidden", whole),
    "ttc.decoder.mlp_hidden_dim": to("task.args.decoder.mlp", whole),
    "ttc.decoder.num_layers": to("task.args.decoder.layers", whole),
    "ttc.decoder.num_heads": to("task.args.decoder.heads", whole),
    "ttc.decoder.frequencies": to("task.args.decoder.frequencies", several(number)),
    "ttc.decoder.latent_dim": _SYSTEM,
    "ttc.decoder.query_dim": nothing("points are (x, y)"),
    "ttc.decoder.output_channels.*": _SYSTEM,
}

LOSSES = {
    "training.lambda_spectral": only((OPERATOR, RESIDUAL), Rule(number, spectral)),
    "training.lambda_relative": only((RESIDUAL,), to("task.args.relative_weight", number)),
    "training.lambda_rollout": only((OPERATOR,), Rule(number, rollout)),
    "training.use_inverse_losses": only((OPERATOR,), Rule(truth, inverse_losses, False)),
    "training.lambda_inv_enc": inverse("inverse_encoding"),
    "training.lambda_inv_dec": inverse("inverse_decoding"),
    "training.inverse_loss_max_weight": inverse("inverse_cap", 0.05),
    "training.inverse_loss_frequency": only(
        (OPERATOR,), where("training.use_inverse_losses", Rule(whole, frequency, 1))
    ),
    "training.inverse_loss_warmup_epochs": only(
        (OPERATOR,), where("training.use_inverse_losses", to("task.args.inverse_warmup", number, 15))
    ),
    "training.query_sampling.enabled": only((OPERATOR,), Rule(truth, sampled)),
    "training.query_sampling.num_queries": query(to("task.args.queries", whole)),
    "training.query_sampling.strategy": query(Rule(text, stratified)),
    "training.query_sampling.curriculum.*": _UNREAD,
    "training.physics_priors.enabled": only((OPERATOR,), Rule(truth, priors, False)),
    "training.physics_priors.lambda_divergence": prior("divergence"),
    "training.physics_priors.lambda_conservation": prior("conservation"),
    "training.physics_priors.lambda_boundary": prior("boundary"),
    "training.physics_priors.lambda_positivity": prior("positivity"),
    "training.physics_priors.lambda_latent_norm": prior("latent_norm"),
    "training.physics_priors.lambda_latent_diversity": prior("latent_diversity"),
    "training.physics_priors.bc_value": of_priors(boundary("value", number)),
    "training.physics_priors.bc_type": of_priors(boundary("edges", text)),
    "training.tau_distribution.type": only((RESIDUAL,), Rule(text, tau)),
    "training.tau_distribution.alpha": only((RESIDUAL,), Rule(number, tau)),
    "training.tau_distribution.beta": only((RESIDUAL,), Rule(number, tau)),
    "training.distill_num_taus": only((DISTILL,), Rule(whole, taus, 3)),
    f"stages.{DISTILL}.tau_schedule": to("task.args.tau_schedule", several(whole)),
}


def wandb_key(name: str, kind: Kind) -> Rule:
    return training(where("logging.wandb.enabled", to(f"loggers.wandb.{name}", kind)))


RUN = {
    "seed": to("seed", whole, 17),
    "deterministic": to("run.deterministic", truth),
    "benchmark": nothing("cuDNN does not look for its fastest kernels here"),
    "training.num_gpus": Rule(whole, devices, 1),
    "training.use_fsdp2": Rule(truth, sharded, False),
    "training.batch_size": Rule(whole, batch_size),
    "training.accum_steps": training(Rule(whole, accumulate, 1)),
    "training.distill_micro_batch": only((DISTILL,), to("batch.micro_batch_size", whole)),
    f"stages.{DISTILL}.batch_size": Rule(whole, distill_batch_size, 8),
    "training.amp": Rule(truth, amp, False),
    "training.amp_dtype": where("training.amp", Rule(text, amp_dtype, "bfloat16")),
    "training.compile": Rule(truth, compiled, False),
    "training.compile_mode": where("training.compile", Rule(text, compile_mode, "default")),
    "training.torch_inductor_disable_cudagraphs": where("training.compile", Rule(truth, no_graphs)),
    "training.dynamo_suppress_errors": nothing("where a compiler fails, the run goes on in eager, on all ranks alike"),
    "training.cpu_offload_optimizer": training(Rule(truth, offload)),
    "training.tune_batch_size": nothing("a command of its own: train.py --tune batch_size"),
    "training.tune_lr": nothing("a command of its own: train.py --tune lr"),
    "training.lightning_profile": training(Rule(anything, profiler)),
    "training.skip_lightning_val": nothing("val/nrmse is always measured: checkpoints and early stopping follow it"),
    "training.patience": training(unless_own("patience", PATIENCE)),
    "training.grad_clip": training(unless_own("grad_clip", CLIP)),
    "training.ema_decay": training(unless_own("ema_decay", EMA)),
    "training.checkpoint_interval": training(
        Rule(whole, lambda value, asked: {"checkpoint.keep_every": f"{value} epochs"})
    ),
    "training.log_per_task_metrics": nothing("of several tasks each is always logged"),
    "training.distill_target_loss": nothing("patience ends a stage"),
    "stages.*.epochs": Rule(whole, epochs, 0),
    "stages.*.patience": PATIENCE,
    "stages.*.grad_clip": CLIP,
    "stages.*.ema_decay": EMA,
    "stages.*.accum_steps": _UNREAD,
    "stages.*.target_loss": nothing("patience ends a stage"),
    **{f"optimizer.{name}": shared(rule) for name, rule in OPTIMIZER.items()},
    **{f"stages.*.optimizer.{name}": own(rule) for name, rule in OPTIMIZER.items()},
    **{f"stages.*.scheduler.{name}": rule for name, rule in SCHEDULER.items()},
    "checkpoint.dir": to("run.root", text, "checkpoints"),
    "logging.wandb.enabled": training(Rule(truth, wandb, True)),
    "logging.wandb.project": wandb_key("project", text),
    "logging.wandb.entity": wandb_key("entity", text),
    "logging.wandb.run_name": Rule(text, run_name),
    "logging.wandb.tags": wandb_key("tags", several(text)),
    "logging.wandb.group": wandb_key("group", text),
    "logging.wandb.notes": wandb_key("notes", text),
}

_NO_STATES = nothing("an evaluation writes figures and pictures into its run's folder")
_RETRIED = nothing("the corrector, where there is one, is a part of every step")

EVALUATED = {
    "evaluation.enabled": only((EVALUATION,), Rule(truth, evaluated, True)),
    "evaluation.split": only((EVALUATION,), Rule(text, split, "test")),
    "ttc.enabled": only((EVALUATION,), Rule(truth, conditioning, False)),
    "ttc.steps": ttc("steps", whole),
    "ttc.candidates": ttc("candidates", whole),
    "ttc.beam_width": ttc("beam_width", whole),
    "ttc.horizon": ttc("horizon", whole),
    "ttc.gamma": ttc("gamma", number),
    "ttc.max_evaluations": ttc("max_evaluations", whole),
    "ttc.residual_threshold": _UNREAD,
    "ttc.debug": nothing("the report shows how much was gained"),
    "ttc.sampler.tau_range": ttc("sampler.tau_range", several(number)),
    "ttc.sampler.noise_std": ttc("sampler.noise_std", number),
    "ttc.sampler.noise_schedule": ttc("sampler.noise_schedule", several(number)),
    "ttc.reward.analytical_weight": nothing("a factor of the only reward changes no choice"),
    "ttc.reward.grid": nothing("fields are compared on the grid of the data"),
    "ttc.reward.mass_field": channel("mass_field", "the first channel"),
    "ttc.reward.energy_field": channel("energy_field", "half the square of all channels"),
    "ttc.reward.momentum_field": conditioned(Rule(several(text), momentum)),
    "ttc.reward.weights.mass": ttc("reward.weights.mass", number),
    "ttc.reward.weights.momentum": ttc("reward.weights.momentum", number),
    "ttc.reward.weights.energy": ttc("reward.weights.energy", number),
    "ttc.reward.weights.penalty_negative": ttc("reward.weights.penalty_negative", number),
    "ttc.reward.critic.*": nothing("there is no learned critic"),
}

RULES: dict[str, Rule] = DATA | NETWORKS | LOSSES | RUN | EVALUATED
_PLACES = {pattern: place for place, pattern in enumerate(RULES)}


def find(key: str) -> Rule | None:
    """The rule of a key."""
    pattern = _pattern(key)
    return RULES[pattern] if pattern else None


def place(key: str) -> int:
    """Of a key's rule in the table."""
    return _PLACES[_pattern(key) or ""]


@cache
def _pattern(key: str) -> str | None:
    candidates = [key, *(key.replace(f"stages.{stage}.", "stages.*.", 1) for stage in STAGES)]
    below = (pattern for pattern in RULES if pattern.endswith(".*") and key.startswith(pattern[:-1]))
    return next((candidate for candidate in candidates if candidate in RULES), next(below, None))


def known() -> list[str]:
    """Every key's name."""
    names = [pattern.removesuffix(".*") for pattern in RULES]
    return [name.replace("*", stage) for name in names for stage in (STAGES if "*" in name else ("",))]
