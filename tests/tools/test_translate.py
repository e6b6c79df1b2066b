"""Every command that the vision scripts' page shows becomes the configuration that means the same, and runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import REPOSITORY
from small_pictures import write_cifar10, write_cifar100, write_folder

from fabric_trainer import cli, command
from fabric_trainer.config import flatten
from models.vision.networks import TORCHVISION, build
from tools import translate
from tools.translate_vision import DROP_PATH
from tools.translate_vision import translate as vision

Keys = dict[str, Any]

TRAIN, WANDB = "python scripts/train_lightning.py", "python scripts/train_lightning_wandb.py"
# what the scripts took for what a command leaves out
DEFAULTS: Keys = {
    "task.path": "models.vision.task.ImageClassification",
    "task.args.dataset": "cifar10",
    "task.args.model": "resnet50",
    "task.args.pretrained": True,
    "data.root": "./data",
    "data.download": True,
    "data.val_split": 0.1,
    "data.num_workers": 4,
    "batch.micro_batch_size": 32,
    "optim.name": "sgd",
    "optim.lr": 0.001,
    "optim.weight_decay": 5e-4,
    "optim.decay_everything": True,
    "optim.args.momentum": 0.9,
    "schedule.name": "cosine",
    "run.max_epochs": 100,
    "run.deterministic": True,
    "checkpoint.monitor": "val/acc",
    "checkpoint.mode": "max",
    "checkpoint.top_k": 3,
    "seed": 42,
}
FOUR_GPUS: Keys = {"fabric.accelerator": "gpu", "fabric.devices": 4, "fabric.strategy": "ddp"}
TO_WANDB: Keys = {"loggers.wandb.watch": "all", "loggers.wandb.log_checkpoints": "best"}
ASSUMED = ("--data-dir", "--pretrained")  # the flags that get a remark where they are left out


class Shown(NamedTuple):
    """A command that the page shows: our keys beside DEFAULTS, train.py's flags, and whose flags get a remark."""

    name: str
    command: str
    keys: Keys = {}
    flags: str = ""
    remarks: tuple[str, ...] = ASSUMED


SHOWN = [
    Shown(
        "basic",
        f"{TRAIN} --model resnet50 --num-classes 10 --data-dir ./data --dataset cifar10 --epochs 100 --batch-size 32 "
        "--lr 0.001",
        {"task.args.num_classes": 10},
        remarks=("--pretrained",),
    ),
    Shown(
        "wandb",
        f"{WANDB} --model convnext_small --num-classes 10 --data-dir ./data --dataset cifar10 --wandb-project "
        "lightning-experiments --wandb-name convnext-baseline --epochs 100",
        {
            "task.args.model": "convnext_small",
            "task.args.drop_path": 0.4,
            "task.args.num_classes": 10,
            "loggers.wandb.project": "lightning-experiments",
            "loggers.wandb.name": "convnext-baseline",
            **TO_WANDB,
        },
        remarks=("--pretrained",),
    ),
    Shown(
        "several devices",
        f"{TRAIN} --model resnet50 --num-classes 10 --data-dir ./data --devices 4 --accelerator gpu",
        {"task.args.num_classes": 10, **FOUR_GPUS},
        remarks=("--pretrained", "--devices"),
    ),
    Shown("ddp", f"{TRAIN} --model resnet50 --devices 4 --accelerator gpu --strategy ddp", FOUR_GPUS),
    Shown(
        "16 bit",
        f"{TRAIN} --model resnet50 --precision 16 --batch-size 64  # Can use larger batch size",
        {"fabric.precision": "16-mixed", "batch.micro_batch_size": 64},
    ),
    Shown("bfloat16", f"{TRAIN} --precision bf16", {"fabric.precision": "bf16-mixed"}),
    Shown(
        "accumulation",
        f"{TRAIN} --batch-size 16 --accumulate-grad-batches 4  # Effective batch size: 16 * 4 = 64",
        {"batch.micro_batch_size": 16, "batch.accumulate": 4},
    ),
    Shown(
        "early stopping",
        f"{TRAIN} --model resnet50 --early-stopping --patience 10  # Stop if no improvement for 10 epochs",
        {"early_stopping.patience": 10},
    ),
    Shown(
        "checkpoints",
        f"{TRAIN} --checkpoint-dir ./checkpoints --save-top-k 3  # Save top 3 models",
        {"run.root": "./checkpoints", "checkpoint.top_k": 3},
        remarks=(*ASSUMED, "--checkpoint-dir"),
    ),
    Shown(
        "resume",
        f"{TRAIN} --resume-from-checkpoint ./checkpoints/model/epoch=50-val_acc=0.85.ckpt",
        flags="--resume ./checkpoints/model/epoch=50-val_acc=0.85.ckpt",
        remarks=(*ASSUMED, "--resume-from-checkpoint"),
    ),
    Shown("profiler", f"{TRAIN} --profiler simple  # or 'advanced', 'pytorch'", {"profiler.name": "simple"}),
    Shown("profiler advanced", f"{TRAIN} --profiler advanced", {"profiler.name": "advanced"}),
    Shown("profiler pytorch", f"{TRAIN} --profiler pytorch", {"profiler.name": "pytorch"}),
    Shown("fast dev run", f"{TRAIN} --fast-dev-run", flags="--fast_dev_run"),
    Shown("validation", f"{TRAIN} --val-split 0.1  # Hold out 10% for validation", {"data.val_split": 0.1}),
    Shown("anything", TRAIN),
    Shown("smaller batches", "--batch-size 16", {"batch.micro_batch_size": 16}),
    Shown("mixed precision", "--precision 16", {"fabric.precision": "16-mixed"}),
    Shown("accumulation of two", "--accumulate-grad-batches 2", {"batch.accumulate": 2}),
    Shown("smaller model", "--model resnet18", {"task.args.model": "resnet18"}),
    Shown("workers", "--num-workers 8", {"data.num_workers": 8}),
    Shown(
        "offline",
        "--wandb-mode offline",
        {"loggers.wandb.project": None, "loggers.wandb.mode": "offline", **TO_WANDB},
        remarks=(*ASSUMED, "--wandb-project"),
    ),
    Shown(
        "quick baseline",
        f"{TRAIN} --model resnet18 --num-classes 10 --data-dir ./data --dataset cifar10 --epochs 50 --fast-dev-run  "
        "# Test first!",
        {"task.args.model": "resnet18", "task.args.num_classes": 10, "run.max_epochs": 50},
        flags="--fast_dev_run",
        remarks=("--pretrained",),
    ),
    Shown(
        "production",
        f"{WANDB} --model convnext_base --num-classes 100 --data-dir ./data --dataset cifar100 --epochs 200 "
        "--batch-size 64 --precision 16 --devices 4 --accelerator gpu --wandb-project production-models "
        "--early-stopping --patience 20",
        {
            "task.args.dataset": "cifar100",
            "task.args.model": "convnext_base",
            "task.args.drop_path": 0.5,
            "task.args.num_classes": 100,
            "run.max_epochs": 200,
            "batch.micro_batch_size": 64,
            "fabric.precision": "16-mixed",
            **FOUR_GPUS,
            "loggers.wandb.project": "production-models",
            **TO_WANDB,
            "early_stopping.patience": 20,
        },
        remarks=("--pretrained", "--devices"),
    ),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(text: str) -> list[str]:
    """As a shell splits it, but that a comment is kept, as where a command is pasted."""
    return shlex.split(text.replace("'", ""))


def main(text: str, *options: str) -> int:
    return translate.main(["vision", *options, "--", *words(text)])


def commands(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("shown", cases, ids=lambda shown: shown.name)


# ---- the mapping --------------------------------------------------------------------------------------------------


@commands(SHOWN)
def test_a_command_becomes_exactly_this_configuration(shown):
    config, flags, remarks = vision(words(shown.command))
    assert flatten(config) == DEFAULTS | shown.keys
    assert flags == shown.flags.split()
    assert [re.split("[ :]", line)[0] for line in remarks] == list(shown.remarks)


def test_no_command_of_the_page_is_left_out(test_data):
    page = test_data / "seeds" / "001_5a0d6714b1ca5874.txt"
    if not page.is_file():
        pytest.skip(f"no {page}")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)).replace("\\\n", " ")
    found = [" ".join(line.split()) for line in blocks.splitlines() if line.startswith("python")]
    ours = [" ".join(shown.command.split()) for shown in SHOWN]
    assert len(found) == 16
    assert [line for line in found if line.removesuffix(" ...") not in ours] == []
    prose = page.read_text().partition("## Troubleshooting")[2].partition("## Resources")[0]
    assert [text for text in re.findall(r"`(--.*?)`", prose) if text.split()[0] not in " ".join(ours)] == []


OTHER_FLAGS: list[tuple[str, Keys, str]] = [  # flags, what is there beside (None: not there), a part of the remarks
    ("--no-pretrained", {"task.args.pretrained": False}, ""),
    ("--pretrained", {}, ""),
    ("--dataset folder --data-dir pets", {"task.args.dataset": "folder", "data.root": "pets", "data.download": None,
        "data.val_split": None, "task.args.image_size": 224}, "there has to be a folder val"),
    ("--dataset folder --val-split 0.2", {"task.args.dataset": "folder", "data.download": None, "data.val_split": 0.2,
        "task.args.image_size": 224}, ""),
    ("--dataset mnist --image-size 64", {"task.args.dataset": "mnist", "task.args.image_size": 64}, ""),
    ("--augmentation strong", {"task.args.transforms": "strong"}, ""),
    ("--optimizer adamw --weight-decay 0.01", {"optim.name": "adamw", "optim.weight_decay": 0.01,
        "optim.args.momentum": None}, ""),
    ("--optimizer adam --momentum 0.8", {"optim.name": "adam", "optim.args.momentum": None},
        "--momentum 0.8: left out, adam has none"),
    ("--momentum 0", {"optim.args.momentum": 0.0}, ""),
    ("--scheduler none", {"schedule.name": "constant"}, ""),
    ("--scheduler step", {"schedule.name": "constant"}, "--scheduler step: not carried"),
    ("--scheduler plateau", {"schedule.name": "plateau", "schedule.factor": 0.1, "schedule.patience": 10,
        "schedule.threshold": 1e-4}, ""),
    ("--gradient-clip-val 1", {"clip.norm": 1.0}, ""),
    ("--gradient-clip-val 0", {}, ""),
    ("--seed 7", {"seed": 7}, ""),
    ("--early-stopping", {"early_stopping.patience": 10}, ""),
    ("--patience 5", {}, "--patience 5: left out, it has no effect without --early-stopping"),
    ("--save-top-k -1", {"checkpoint.top_k": None, "checkpoint.keep_every": "1 epochs"}, "every epoch's checkpoint"),
    ("--precision bf16-mixed --accelerator cuda",
        {"fabric.precision": "bf16-mixed", "fabric.accelerator": "cuda"}, ""),
    ("--precision 32", {"fabric.precision": "32-true"}, ""),
    ("--devices 0,2", {"fabric.devices": [0, 2], "fabric.strategy": "ddp"}, "--devices: several are"),
    ("--devices auto", {"fabric.devices": -1}, ""),
    ("--devices 2 --strategy dp", {"fabric.devices": 2, "fabric.strategy": "ddp"}, "--strategy dp: here it is ddp"),
    ("--devices 2 --strategy fsdp", {"fabric.devices": 2, "fabric.strategy": "fsdp"}, ""),
    ("--devices 2 --strategy deepspeed_stage_3",
        {"fabric.devices": 2, "fabric.strategy": "deepspeed", "fabric.stage": 3}, ""),
    ("--wandb-project p --wandb-mode disabled", {}, "--wandb-mode disabled: nothing goes to W&B"),
    ("--wandb-project p --wandb-entity e --wandb-notes n --wandb-tags a b",
        {"loggers.wandb.project": "p", "loggers.wandb.entity": "e", "loggers.wandb.notes": "n",
         "loggers.wandb.tags": ["a", "b"], **TO_WANDB}, ""),
    ("--resume-from-checkpoint runs/a/checkpoints/last.pt", {}, ""),
    ("--checkpoint-dir out", {"run.root": "out"}, "--checkpoint-dir out: a run leaves out/NAME/"),
]  # fmt: skip


@pytest.mark.parametrize("flags, keys, remark", OTHER_FLAGS, ids=[case[0] for case in OTHER_FLAGS])
def test_the_scripts_other_flags_and_values(flags, keys, remark):
    config, _, remarks = vision(["--data-dir", "./data", "--pretrained", *flags.split()])
    assert flatten(config) == {key: value for key, value in (DEFAULTS | keys).items() if value is not None}
    assert len(remarks) == bool(remark) and all(remark in line for line in remarks)


QUICKLY_BUILT = ("efficientnet_b0", "swin_t", "convnext_tiny", "resnet18")


@pytest.mark.parametrize(
    "model", [name if name in QUICKLY_BUILT else pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION]
)
def test_dropped_paths_are_those_of_the_librarys_network(model):
    from torchvision.models import get_model
    from torchvision.ops import StochasticDepth

    def rates(network):
        return [part.p for part in network.modules() if isinstance(part, StochasticDepth)]

    with torch.device("meta"):
        ours = build(model, 10, image_size=224, drop_path=DROP_PATH.get(model, 0.0))
        assert rates(ours) == pytest.approx(rates(get_model(model)))


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--model resnet18 --colour red", "the scripts have no flag: --colour red"),
        ("--epoch 3", "no flag: --epoch 3"),
        ("--data-dir ./data more", "no flag: more"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--epochs 0", "run.max_epochs must be at least 1, not 0"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--precision 8", "argument --precision: invalid choice: '8'"),
        ("--dataset imagenet", "argument --dataset: invalid choice: 'imagenet'"),
        ("--devices two", "argument --devices: invalid"),
    ],
)
def test_wrong_input_gets_one_line(flags, says, home, capsys):
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_what_is_printed_and_written(home, capsys):
    resume = next(shown for shown in SHOWN if shown.name == "resume")
    assert main(resume.command) == 0
    out, err = capsys.readouterr()
    assert flatten(yaml.safe_load(out)) == DEFAULTS
    run = "python train.py --config vision.yaml --resume ./checkpoints/model/epoch=50-val_acc=0.85.ckpt"
    first, *remarks = err.splitlines()
    assert first == f"saved as vision.yaml: {run}" and len(remarks) == 3

    assert main(resume.command, "-o", "a.yaml") == 0
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [run.replace("vision.yaml", "a.yaml"), *remarks]
    text = (home / "a.yaml").read_text()
    assert text.startswith(f"# {resume.command}\ntask:\n")  # where it came from
    read = flatten(asdict(command.load("a.yaml")))
    assert {key: read[key] for key in DEFAULTS} == DEFAULTS

    assert main("--epochs 3", "-o", "a.yaml") == 2
    assert "-o a.yaml exists" in capsys.readouterr().err
    assert (home / "a.yaml").read_text() == text
    assert main("--epochs 3", "-o", "no/a.yaml") == 2
    assert "there is no folder no" in capsys.readouterr().err
    assert translate.main(["vision", "--epochs", "3"]) == 2
    assert "come after --" in capsys.readouterr().err


# ---- the runs -----------------------------------------------------------------------------------------------------

# The others are of a configuration, or ask for a flag, that one of these has too
QUICK = ("basic", "wandb", "16 bit", "bfloat16", "accumulation", "early stopping", "checkpoints", "resume", "profiler",
         "fast dev run", "validation", "anything", "quick baseline", "ddp", "production")  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sets in the published layouts."""
    root = tmp_path_factory.mktemp("sets")
    write_cifar100(write_cifar10(root, train=80, test=20), train=200, test=100)
    return root


def written(shown: Shown, sets: Path) -> list[str]:
    """The arguments of train.py for a command, its configuration in vision.yaml. Replaced are: where the data lies, the
    weights from elsewhere, GPUs by at most two processes on the CPU, fp16 by bfloat16, W&B by its offline mode; and to
    save time the loaders' processes, unless the command says how many, and the batch of each of two processes."""
    config, flags, _ = vision(words(shown.command))
    Path("vision.yaml").write_text(translate.to_yaml(config))
    fabric = config.get("fabric", {})
    keys: Keys = {"data.root": sets, "task.args.pretrained": "false", "fabric.accelerator": "cpu"}
    keys |= {"fabric.devices": 2, "batch.micro_batch_size": 8} if "devices" in fabric else {}
    keys |= {"fabric.precision": "bf16-mixed"} if fabric.get("precision") == "16-mixed" else {}
    keys |= {"loggers.wandb.mode": "offline"} if "loggers" in config else {}
    keys |= {} if "--num-workers" in shown.command else {"data.num_workers": 0}
    pairs = (word for key, value in keys.items() for word in (f"--{key}", str(value)))
    return ["--config", "vision.yaml", *flags, *pairs]


def gpu(shown: Shown) -> bool:
    return "--accelerator gpu" in shown.command or "--precision 16" in shown.command


def runs(several: bool) -> Any:
    cases = [shown for shown in SHOWN if ("--devices" in shown.command) == several]
    return commands([case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in cases])


@runs(several=False)
def test_a_command_runs(shown, sets, home, capsys):
    assert cli.main([*written(shown, sets), "--fast_dev_run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^val/acc [01]\.", out, re.MULTILINE) and re.search(r"^test/acc [01]\.", out, re.MULTILINE)
    assert not (home / "runs").exists()


@pytest.mark.distributed
@runs(several=True)
def test_a_command_runs_in_two_processes(shown, sets, home):
    train = [sys.executable, str(REPOSITORY / "train.py"), *written(shown, sets), "--fast_dev_run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(train, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x 2 ranks" in done.stdout and len(re.findall("^test/acc ", done.stdout, re.MULTILINE)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the command would run")
@commands([case for case in SHOWN if gpu(case)])
def test_without_a_gpu_a_command_for_one_ends_in_a_line(shown, home, capsys):
    config, *_ = vision(words(shown.command))
    Path("vision.yaml").write_text(translate.to_yaml(config))
    assert cli.main(["--config", "vision.yaml"]) == 2
    err = capsys.readouterr().err
    missing = "fabric.accelerator: cuda" if "--accelerator gpu" in shown.command else "fabric.precision: 16-mixed"
    assert err.startswith(f"error: {missing}") and err.count("\n") == 1


def test_a_translated_command_resumes_a_file_of_ours(sets, home, capsys):
    (shown,) = (shown for shown in SHOWN if shown.name == "resume")
    fast = ["--task.args.model", "fast", "--run.max_epochs", "2", "--checkpoint.keep_last", "9"]
    assert cli.main([*written(Shown("first", f"{TRAIN}"), sets), *fast, "--name", "first"]) == 0
    saved = [torch.load(path, weights_only=True) for path in (home / "runs/first/checkpoints").glob("step-*.pt")]
    saved.sort(key=lambda state: state["counters"]["step"])
    half, whole = saved
    torch.save(half, "half.pt")
    command = shown._replace(command=shown.command.replace("./checkpoints/model/epoch=50-val_acc=0.85.ckpt", "half.pt"))
    capsys.readouterr()
    assert cli.main([*written(command, sets), *fast, "--name", "second"]) == 0
    assert "resumed from" in capsys.readouterr().out
    again = torch.load(home / "runs/second/checkpoints/last.pt", weights_only=True)
    steps = [state["counters"]["step"] for state in (half, whole, again)]
    assert steps == [steps[0], 2 * steps[0], 2 * steps[0]]
    for name, weight in whole["model"].items():
        assert torch.equal(again["model"][name], weight), name


@pytest.mark.slow
def test_a_translated_command_logs_to_wandb(sets, home):
    (shown,) = (shown for shown in SHOWN if shown.name == "wandb")
    small = ["--task.args.model", "fast", "--task.args.drop_path", "0", "--run.max_epochs", "1"]
    assert cli.main([*written(shown, sets), *small, "--name", "a"]) == 0
    (offline,) = (home / "runs/a/wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))


def test_a_lightning_checkpoint_is_refused_in_a_line(sets, home, capsys):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "epoch=50-val_acc=0.85.ckpt")
    command = Shown("resume", "--resume-from-checkpoint epoch=50-val_acc=0.85.ckpt")
    assert cli.main(written(command, sets)) == 2
    err = capsys.readouterr().err
    assert "epoch=50-val_acc=0.85.ckpt" in err and err.count("\n") == 1


# ---- the recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10_resnet18", "folder_convnext"])
def test_a_recipe_runs(name, sets, home, capsys):
    root = write_folder(home / "pictures", size=40) if name.startswith("folder") else sets
    keys = ["--data.root", str(root), "--task.args.pretrained", "false", "--fabric.accelerator", "cpu"]
    keys += ["--data.num_workers", "0", "--task.args.image_size", "32"]
    assert cli.main(["--config", str(REPOSITORY / "configs" / f"{name}.yaml"), *keys, "--fast_dev_run"]) == 0
    monitored = {"cifar10_resnet18": "val/acc", "folder_convnext": "val_ema/acc"}[name]
    assert re.search(rf"^{monitored} [01]\.", capsys.readouterr().out, re.MULTILINE)
