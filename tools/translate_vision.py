"""The flags of the vision scripts train_lightning.py and train_lightning_wandb.py as our configuration.

What a command leaves out is what the scripts took then: resnet50 with pretrained weights on CIFAR-10, SGD with momentum
and a cosine schedule, a tenth of the training pictures for validation, the three best checkpoints by val/acc.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fabric_trainer.errors import InputError

Section = dict[str, Any]

TASK = "models.vision.task.ImageClassification"
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
PRECISIONS |= {name: name for name in ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")}
STRATEGIES: dict[str, Section] = {  # of Lightning's Trainer, as keys of fabric
    "auto": {},
    "ddp": {"strategy": "ddp"},
    "ddp_find_unused_parameters_true": {"strategy": "ddp", "ddp": {"find_unused_parameters": True}},
    "ddp_spawn": {"strategy": "ddp_spawn"},
    "ddp_notebook": {"strategy": "ddp_notebook"},
    "dp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "deepspeed": {"strategy": "deepspeed"},
    **{f"deepspeed_stage_{stage}": {"strategy": "deepspeed", "stage": stage} for stage in (1, 2, 3)},
}
SCHEDULES: dict[str, Section] = {
    "cosine": {"name": "cosine"},
    "plateau": {"name": "plateau", "factor": 0.1, "patience": 10, "threshold": 1e-4},
    "none": {"name": "constant"},
    "step": {"name": "constant"},
}
# of torchvision's networks, which the scripts left as they are; here no network has any by itself
DROP_PATH = {f"efficientnet_b{number}": 0.2 for number in range(5)} | {
    "swin_t": 0.2,
    "swin_s": 0.3,
    "swin_b": 0.5,
    "convnext_tiny": 0.1,
    "convnext_small": 0.4,
    "convnext_base": 0.5,
    "convnext_large": 0.5,
}


def translate(words: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """(our configuration, flags of train.py beside it, remarks) of the scripts' flags, or of a whole command.

    A remark is a line about what could not be carried over, means something else here, or had to be assumed. Raises
    InputError for what the scripts would not have taken.
    """
    script, words = _script(words)
    given = _parser().parse_args(words)
    config = {
        "task": {"path": TASK, "args": _task(given)},
        "data": _data(given),
        "batch": {"micro_batch_size": given.batch_size} | _some(accumulate=given.accumulate_grad_batches),
        "optim": _optim(given),
        "schedule": SCHEDULES[given.scheduler],
        "clip": _some(norm=given.gradient_clip_val or None),
        "fabric": _fabric(given),
        "run": _some(root=given.checkpoint_dir) | {"max_epochs": given.epochs, "deterministic": True},
        "early_stopping": _stopping(given),
        "checkpoint": {"monitor": "val/acc", "mode": "max"} | _kept(given.save_top_k),
        "loggers": _loggers(given, script),
        "profiler": _some(name=given.profiler),
        "seed": given.seed,
    }
    flags = ["--fast_dev_run"] if given.fast_dev_run else []
    flags += ["--resume", given.resume_from_checkpoint] if given.resume_from_checkpoint else []
    return {key: value for key, value in config.items() if value != {}}, flags, _remarks(given, script)


def _script(words: Sequence[str]) -> tuple[str, list[str]]:
    """The script's name, where a whole command was given, and the flags; a comment at the end is no flag."""
    comment = next((place for place, word in enumerate(words) if word.startswith("#")), len(words))
    words = list(words[:comment])
    if words and Path(words[0]).name.startswith("python"):
        del words[0]
    return (Path(words[0]).name, words[1:]) if words and words[0].endswith(".py") else ("", words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message.replace("unrecognized arguments", "the scripts have no flag"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="resnet50")
    add("--num-classes", type=int)
    add("--pretrained", action=argparse.BooleanOptionalAction)
    add("--data-dir")
    add("--dataset", default="cifar10", choices=("cifar10", "cifar100", "mnist", "fashionmnist", "folder"))
    add("--image-size", type=int)
    add("--augmentation", choices=("none", "default", "strong", "autoaugment", "randaugment"))
    add("--val-split", type=float)
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=32)
    add("--accumulate-grad-batches", type=int)
    add("--lr", type=float, default=0.001)
    add("--optimizer", default="sgd", choices=("sgd", "adam", "adamw"))
    add("--momentum", type=float)
    add("--weight-decay", type=float, default=5e-4)
    add("--scheduler", default="cosine", choices=tuple(SCHEDULES))
    add("--gradient-clip-val", type=float)
    add("--num-workers", type=int, default=4)
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    add("--devices", type=_devices, default=1)
    add("--strategy", choices=tuple(STRATEGIES))
    add("--precision", choices=tuple(PRECISIONS))
    add("--early-stopping", action="store_true")
    add("--patience", type=int)
    add("--checkpoint-dir")
    add("--save-top-k", type=int, default=3)
    add("--resume-from-checkpoint")
    add("--profiler", choices=("simple", "advanced", "pytorch"))
    add("--fast-dev-run", action="store_true")
    add("--seed", type=int, default=42)
    for name in ("project", "entity", "name", "notes"):
        add(f"--wandb-{name}")
    add("--wandb-tags", nargs="+")
    add("--wandb-mode", choices=("online", "offline", "disabled"))
    return parser


def _devices(text: str) -> int | list[int]:
    """Lightning's: how many (auto and -1 are all), or which, as in 0,2."""
    if text == "auto":
        return -1
    return [int(index) for index in text.split(",")] if "," in text else int(text)


def _task(given: argparse.Namespace) -> Section:
    size = given.image_size or (224 if given.dataset == "folder" else None)  # else the set's own
    return {
        "dataset": given.dataset,
        "model": given.model,
        **_some(num_classes=given.num_classes),
        "pretrained": given.pretrained is not False,
        **_some(drop_path=DROP_PATH.get(given.model), image_size=size, transforms=given.augmentation),
    }


def _data(given: argparse.Namespace) -> Section:
    root, published = given.data_dir or "./data", given.dataset != "folder"
    share = 0.1 if given.val_split is None and published else given.val_split
    fetched = {"download": True} if published else {}
    return {"root": root} | fetched | _some(val_split=share) | {"num_workers": given.num_workers}


def _optim(given: argparse.Namespace) -> Section:
    """The scripts' weight decay was for all parameters."""
    optim = {"name": given.optimizer, "lr": given.lr, "weight_decay": given.weight_decay, "decay_everything": True}
    if given.optimizer != "sgd":
        return optim
    return optim | {"args": {"momentum": 0.9 if given.momentum is None else given.momentum}}


def _fabric(given: argparse.Namespace) -> Section:
    strategy = given.strategy or ("ddp" if _several(given.devices) else "auto")
    fabric: Section = {} if given.accelerator == "auto" else {"accelerator": given.accelerator}
    fabric |= {} if given.devices == 1 else {"devices": given.devices}
    return fabric | STRATEGIES[strategy] | _some(precision=PRECISIONS.get(given.precision))


def _several(devices: int | list[int]) -> bool:
    return len(devices) > 1 if isinstance(devices, list) else devices > 1


def _stopping(given: argparse.Namespace) -> Section:
    """On val/acc, as the checkpoints."""
    return {"patience": 10 if given.patience is None else given.patience} if given.early_stopping else {}


def _kept(top_k: int) -> Section:
    """Lightning's -1 keeps all."""
    return {"keep_every": "1 epochs"} if top_k == -1 else {"top_k": top_k}


def _loggers(given: argparse.Namespace, script: str) -> Section:
    asked = _some(
        project=given.wandb_project,
        entity=given.wandb_entity,
        name=given.wandb_name,
        tags=given.wandb_tags,
        notes=given.wandb_notes,
        mode=given.wandb_mode,
    )
    if given.wandb_mode == "disabled" or not (asked or "wandb" in script):
        return {}
    return {"wandb": {"project": None} | asked | {"watch": "all", "log_checkpoints": "best"}}


def _some(**values: Any) -> Section:
    """Those that were given."""
    return {key: value for key, value in values.items() if value is not None}


def _remarks(given: argparse.Namespace, script: str) -> list[str]:
    """What was not carried over, what means something else here, and what was assumed."""
    folder, resumed = given.checkpoint_dir, given.resume_from_checkpoint or ""
    momentum = given.momentum is not None and given.optimizer != "sgd"
    wandb = _loggers(given, script).get("wandb")
    remarks = [
        (given.data_dir is None, "--data-dir: not given, ./data was assumed"),
        (given.val_split is None and given.dataset == "folder", "--val-split: not given, so there has to be a folder "
            "val; where there is none, data.val_split: 0.1 is the scripts' share"),
        (given.pretrained is None, "--pretrained: the scripts always loaded ImageNet weights, and so does "
            "task.args.pretrained: true; --no-pretrained leaves them out"),
        (given.patience is not None and not given.early_stopping,
            f"--patience {given.patience}: left out, it has no effect without --early-stopping"),
        (momentum, f"--momentum {given.momentum}: left out, {given.optimizer} has none"),
        (given.scheduler == "step", "--scheduler step: not carried, the rate is constant; schedule.every counts "
            "updates, not 30 epochs: --schedule.name step --schedule.every N"),
        (_several(given.devices) and given.strategy is None,
            "--devices: several are DistributedDataParallel here, a process each, not DataParallel"),
        (given.strategy == "dp", "--strategy dp: here it is ddp, DistributedDataParallel, a process each"),
        (folder is not None, f"--checkpoint-dir {folder}: a run leaves {folder}/NAME/ with checkpoints/, metrics.csv "
            "and report.html; --name NAME chooses it"),
        (given.save_top_k == -1, "--save-top-k -1: every epoch's checkpoint is kept for good; best.pt is the best"),
        (resumed.endswith(".ckpt"), f"--resume-from-checkpoint {resumed}: a file of Lightning's can't be "
            "continued, only ours, NAME/checkpoints/*.pt; --task.args.pretrained takes its weights"),
        (wandb is not None and wandb["project"] is None,
            "--wandb-project: not given, W&B lists the run as uncategorized"),
        (given.wandb_mode == "disabled", "--wandb-mode disabled: nothing goes to W&B"),
    ]  # fmt: skip
    return [text for holds, text in remarks if holds]
