"""What the start-up summary says of a run, beside the network's modules."""

from __future__ import annotations

import torch

from fabric_trainer import schedule
from fabric_trainer.duration import spoken
from fabric_trainer.order import accumulation
from fabric_trainer.several import kernels
from fabric_trainer.state import State


def describe(state: State) -> dict[str, str]:
    """Label -> text."""
    fabric, order, config, engine = state.fabric, state.order, state.config, state.engine
    micro, ranks = order.micro_batch_size, state.ranks.size
    first = accumulation(state.accumulate, 0, 0)
    changes = "" if isinstance(state.accumulate, int) else f", then by {state.accumulate}"
    precision = getattr(fabric.strategy.precision, "precision", config.fabric.precision)
    corners = schedule.corners(state.share, config.schedule.warmup, state.steps)
    return {
        "effective batch": f"{micro} micro x {first} accumulate x {ranks} rank{'s' * (ranks > 1)}"
        f" = {micro * first * ranks}{changes}",
        "updates": f"{order.first_window(1)} in the first epoch, {state.steps} in all",
        "samples": f"{order.length(0)} an epoch",
        **_limits(state),
        "schedule": f"{config.schedule.name}: "
        + ", ".join(f"{share * max(state.peaks):.3g} at {step}" for step, share in corners.items()),
        "optimizer": " + ".join(type(kernel).__name__ for kernel in kernels(engine.bare_optimizer))
        + ", groups "
        + ", ".join(
            f"{group['name']} ({len(names)})"
            for group, names in zip(engine.bare_optimizer.param_groups, engine.names, strict=True)
        ),
        "device": f"{fabric.device}, strategy {config.fabric.strategy}, precision {precision}",
        **state.task.describe(),
        **({"freezing": state.freezer.describe()} if state.freezer.parts else {}),
        "compile": state.compilation.describe(),
        "out of memory": state.memory.describe(),
        "threads": str(torch.get_num_threads()),
        "seed": str(config.seed),
    }


def _limits(state: State) -> dict[str, str]:
    """What ends or limits the run beside its length."""
    run, stopping, lines = state.config.run, state.config.early_stopping, {}
    if run.overfit_batches is not None:
        lines["overfit"] = f"the first {run.overfit_batches} updates of epoch 0 are the train and the val split"
    if run.limit_train_batches is not None:
        lines["train limit"] = f"{state.order.length(0)} of {state.order.plan.length(0)} samples in the first epoch"
    if run.limit_val_batches is not None and state.val_set is not None:
        val = state.split("val")
        lines["val limit"] = f"{val.samples} of {val.whole} samples"
    if run.max_time is not None:
        lines["max time"] = spoken(state.most_minutes * 60)
    if stopping.patience is not None:
        monitor = stopping.monitor or state.config.checkpoint.monitor
        lines["early stopping"] = f"after {stopping.patience} evaluations without a better {monitor}"
    return lines
