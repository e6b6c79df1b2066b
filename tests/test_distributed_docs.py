"""docs/distributed.md and docs/troubleshooting.md: what they show runs, and what they quote is what is said."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import REPOSITORY

from fabric_trainer import cli, slurm, strategies
from fabric_trainer.command import load, parse
from fabric_trainer.config import Config, FabricConfig, flatten
from fabric_trainer.errors import FAILED, FINISHED, INPUT, SMALLER, InputError
from fabric_trainer.faults import StopSignals
from fabric_trainer.fsdp import check_resettable, split_layers
from fabric_trainer.launch import resolve
from fabric_trainer.lifeline import Lifeline

PAGES = {name: (REPOSITORY / "docs" / f"{name}.md").read_text() for name in ("distributed", "troubleshooting")}
LAUNCHERS = ("LT_", "SLURM_", "TORCHELASTIC_", "KUBERNETES_", "MASTER_", "PET_", "GROUP_", "LOCAL_", "NODE_")
NEEDS_GPU = "# needs a GPU\n"
CPUS = 2  # processes of a launch

# a common DeepSpeed configuration of tutorials: it has to train as it stands
TUTORIAL = """{
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "gradient_accumulation_steps": "auto",
  "zero_optimization": {
    "stage": 3,
    "offload_optimizer": {
      "device": "cpu",
      "pin_memory": true
    },
    "offload_param": {
      "device": "cpu",
      "pin_memory": true
    },
    "overlap_comm": true,
    "contiguous_gradients": true,
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e8,
    "stage3_param_persistence_threshold": 1e6
  },
  "bf16": {
    "enabled": true
  }
}
"""

# the page's task with something wrong, from the at-th training forward on
SICK = """
import os, signal
import torch, wide
from fabric_trainer import Loss

class Sick(wide.Sine):
    def __init__(self, fault: str = "", at: int = 0, forwards: int = 1, width: int = 64, depth: int = 4):
        super().__init__(width, depth)
        self.fault, self.at, self.forwards, self.calls = fault, at, forwards, -1

    def loss(self, network, batch):
        self.calls += network.training
        loss = super().loss(network, batch)
        if not network.training or not self.at <= self.calls < self.at + self.forwards:
            return loss
        if self.fault == "memory" and len(batch["x"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.fault == "killed" and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Loss(loss.total * torch.nan) if self.fault == "nan" else loss
"""


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


(WIDE, NOTEBOOK), (CONVERSION,) = fenced("distributed", "python"), fenced("troubleshooting", "python")
(OWN_JSON,) = fenced("distributed", "json")
BASE, *OTHERS = fenced("distributed", "yaml")
(MANIFEST,) = (text for text in OTHERS if "\nkind:" in text)
SNIPPETS = [text for text in OTHERS if text != MANIFEST] + fenced("troubleshooting", "yaml")


def laid_over(base: Any, snippet: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(snippet, dict):
        return snippet
    return base | {key: laid_over(base.get(key), value) for key, value in snippet.items()}


def document(snippet: str) -> dict[str, Any]:
    return laid_over(yaml.safe_load(BASE), yaml.safe_load(snippet))


def named(snippet: str) -> str:
    """A test's name for it."""
    return re.sub(r"\W+", " ", snippet.removeprefix(NEEDS_GPU))[:60].strip()


def furnish(folder: Path) -> Path:
    """What the pages' snippets find beside them."""
    (folder / "wide.py").write_text(WIDE)
    (folder / "sick.py").write_text(SICK)
    (folder / "wide.yaml").write_text(BASE)
    (folder / "deepspeed.json").write_text(OWN_JSON)
    (folder / "tutorial.json").write_text(TUTORIAL)
    return folder


def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    for name in ("RANK", "WORLD_SIZE"):
        clean.pop(name, None)
    path = [folder, REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "distributed"]
    clean |= {"PYTHONPATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300, check=False)


# ---- every snippet that runs on CPUs, in one launch of two processes ------------------------------------------------


def on_cpus() -> dict[str, str]:
    """name -> snippet; DeepSpeed's run on CPUs in tests alone."""
    snippets = [text for text in SNIPPETS if "spawn" not in text and "wandb" not in text]
    plain = {named(text): text for text in snippets if not text.startswith(NEEDS_GPU)}
    zero = {named(text): text for text in snippets if "deepspeed" in text}
    return plain | zero


TUTORIAL_RUN = "fabric: {strategy: deepspeed, deepspeed: {config: tutorial.json}}"


def worker() -> None:
    """In each process: the snippets one after the other; codes.json keeps their exit codes."""
    torch.set_num_threads(1)
    gc.freeze()  # so that no run walks what is imported
    codes: dict[str, int] = {}
    runs = [(name, snippet, ["--fast_dev_run"]) for name, snippet in on_cpus().items()]
    runs.append(("tutorial", TUTORIAL_RUN, ["--name", "tutorial", "--run.max_steps", "20"]))
    runs.append(("killed", "task: {path: sick.Sick, args: {fault: killed, at: 3}}", ["--name", "killed"]))
    for name, snippet, arguments in sorted(runs, key=lambda run: (run[0] == "killed", "deepspeed" in run[1])):
        made = document(snippet)
        if "deepspeed" in snippet:
            if strategies.TABLE["deepspeed"].cpu is False:
                import deepspeed_cpu

                deepspeed_cpu.allow()
            made["fabric"] |= {"accelerator": "cpu", "devices": CPUS}
        rank = os.environ["RANK"]
        Path(f"{name}-{rank}.yaml").write_text(yaml.safe_dump(made))
        codes[name] = cli.main(["--config", f"{name}-{rank}.yaml", *arguments])
        Path(f"codes-{rank}.json").write_text(json.dumps(codes))


class Launch(NamedTuple):
    folder: Path
    codes: dict[str, int]
    said: str


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = furnish(tmp_path_factory.mktemp("two"))
    torchrun = str(Path(sys.executable).parent / "torchrun")
    done = start(folder, torchrun, "--standalone", "--nproc-per-node", str(CPUS), __file__)
    both = [json.loads((folder / f"codes-{rank}.json").read_text()) for rank in range(CPUS)]
    assert both[0] == both[1], done.stderr[-3000:]
    return Launch(folder, both[0], done.stdout + done.stderr)


@pytest.mark.distributed
@pytest.mark.parametrize("name", on_cpus())
def test_a_snippet_runs_on_two_processes(two, name):
    assert two.codes.get(name) == FINISHED, two.said[-3000:]


@pytest.mark.distributed
def test_a_deepspeed_configuration_of_tutorials_trains_as_it_stands(two):
    """Stage 3, offloaded, in bf16: 20 updates, after which the loss is lower."""
    assert two.codes.get("tutorial") == FINISHED, two.said[-3000:]
    history = json.loads((two.folder / "runs" / "tutorial" / "history.json").read_text())
    measured = [entry["val/loss"] for entry in history["evaluations"]]
    assert history["evaluations"][-1]["step"] == 20
    assert measured[-1] < 0.5, "the variance of the targets"
    assert "precision bf16-mixed" in two.said


@pytest.mark.slow
@pytest.mark.distributed
def test_spawned_processes(tmp_path):
    (snippet,) = (text for text in SNIPPETS if "ddp_spawn" in text)
    (furnish(tmp_path) / "spawn.yaml").write_text(yaml.safe_dump(document(snippet)))
    train = [sys.executable, str(REPOSITORY / "train.py"), "--config", "spawn.yaml", "--fast_dev_run"]
    done = start(tmp_path, *train)
    assert done.returncode == FINISHED, done.stderr
    assert f"x {CPUS} ranks" in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_the_notebooks_cell(tmp_path):
    (furnish(tmp_path) / "cell.py").write_text(f"{NOTEBOOK}\nprint('code', code)")
    done = start(tmp_path, sys.executable, "cell.py")
    assert f"x {CPUS} ranks" in done.stdout and "code 0" in done.stdout, done.stderr


# ---- every snippet's keys -------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No GPU and no launcher, in a folder with what the pages' snippets find beside them."""
    for name in [*os.environ]:
        if name.startswith(LAUNCHERS) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(furnish(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("wide", "sick"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield monkeypatch
    for name in ("wide", "sick"):
        sys.modules.pop(name, None)


def with_gpus(machine: pytest.MonkeyPatch, count: int = 8) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("snippet", [BASE, *SNIPPETS], ids=named)
def test_a_snippets_keys_are_valid(machine, snippet):
    if snippet.startswith(NEEDS_GPU):
        with_gpus(machine)
        machine.setattr("importlib.util.find_spec", lambda name: object())  # the packages that it needs
    Path("snippet.yaml").write_text(yaml.safe_dump(document(snippet)))
    config = load("snippet.yaml")
    resolved = resolve(config.fabric)
    assert strategies.problems(config, resolved) == []
    if not snippet.startswith(NEEDS_GPU) and "fabric" in snippet:
        assert resolved.accelerator != "cuda"


def test_snippets_that_need_a_gpu_say_so(machine):
    labelled = [text for text in SNIPPETS if text.startswith(NEEDS_GPU)]
    assert len(labelled) == 8
    for snippet in labelled:
        Path("snippet.yaml").write_text(yaml.safe_dump(document(snippet)))
        assert any("needs" in line or "cuda" in line for line in strategies.problems(load("snippet.yaml")))


def commands() -> list[str]:
    lines = [line for page in PAGES for text in fenced(page, "bash") for line in text.replace("\\\n", "").splitlines()]
    return [line for line in lines if "train.py" in line]


@pytest.mark.parametrize("line", commands())
def test_a_commands_flags_are_valid(machine, line):
    words = shlex.split(line, comments=True)
    place = words.index("train.py")
    parse(words[place + 1 :])
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(words[1:]).training_script == "train.py"
    elif words[0] == "fabric":
        from lightning.fabric.cli import _run

        Path("train.py").touch()
        given = _run.make_context("run", words[2:]).params
        assert given["script"].endswith("train.py") and given["devices"] == "2"


def test_the_manifests_command_is_valid(machine):
    replicas = yaml.safe_load(MANIFEST)["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for role in replicas.values():
        (container,) = role["template"]["spec"]["containers"]
        assert container["command"][:2] == ["python", "train.py"]
        command, config = parse(container["command"][2:])
        assert command.resume == "auto" and config.name == "wide"


def test_every_key_that_a_page_names_exists():
    config = Config()
    keys = flatten(json.loads(json.dumps(config, default=vars)))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for name, page in PAGES.items():
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?: [^`]*)?`", page):
            if key.partition(".")[0] in sections and not key.startswith("task."):
                assert any(own == key or own.startswith(f"{key}.") for own in keys), f"{name}.md names {key}"


def test_links_lead_somewhere():
    for page in PAGES.values():
        for name, anchor in re.findall(r"\]\(([\w.]*)#?([\w-]*)\)", page):
            text = (REPOSITORY / "docs" / name).read_text() if name else page
            titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in known, f"{name}#{anchor}"


# ---- what the page says of strategies -------------------------------------------------------------------------------


def table() -> str:
    """strategies.TABLE in Markdown: a column for the strategies that can do the same."""
    alike = [([name for name, _ in items], row) for row, items in groupby(strategies.TABLE.items(), lambda i: i[1])]
    lines = ["| | " + " | ".join("<br>".join(f"`{name}`" for name in names) for names, _ in alike) + " |"]
    lines.append("|---" * (len(alike) + 1) + "|")
    for key, heading in strategies.HEADINGS.items():
        cells = [strategies._cell(getattr(row, key)).replace("\n", "<br>") for _, row in alike]
        lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_pages_table_is_the_programs():
    assert table() in PAGES["distributed"], f"docs/distributed.md should have this table:\n{table()}"


def test_bytes_of_a_parameter():
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.sum().backward()
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    moments = [value for value in optimizer.state[weight].values() if value.numel() > 1]
    assert [t.nbytes / t.numel() for t in (weight, weight.grad, *moments)] == [4, 4, 4, 4]
    assert "16 bytes" in PAGES["distributed"]


# ---- messages -------------------------------------------------------------------------------------------------------


def quoted() -> set[str]:
    return {line for text in fenced("troubleshooting", "text") for line in text.splitlines()}


@pytest.fixture
def say(machine, capfd) -> Iterator[Callable[..., str]]:
    """say(*arguments, code=..., **environment): all that train.py prints."""

    def run(*arguments: str, code: int = FINISHED, **environment: str) -> str:
        with pytest.MonkeyPatch.context() as variables:
            for name, value in environment.items():
                variables.setenv(name, value)
            given = ["--config", "wide.yaml", "--fabric.accelerator", "cpu", "--run.max_steps", "20", *arguments]
            assert cli.main(given) == code
        captured = capfd.readouterr()
        return captured.out + captured.err

    yield run


def sick(fault: str, at: int, forwards: int = 1) -> list[str]:
    keys = {"path": "sick.Sick", "args.fault": fault, "args.at": str(at), "args.forwards": str(forwards)}
    return [f"--task.{key}={value}" for key, value in keys.items()]


SEEN: set[str] = set()
"""Quoted lines that a test has provoked."""


def expect(said: str, *starts: str) -> None:
    """The lines of the page that begin so, of which there is one each, are among what is said."""
    spoken = [line.strip() for line in said.splitlines()]
    for beginning in starts:
        (line,) = (line for line in quoted() if line.startswith(beginning))
        assert any(s == line for s in spoken), f"{line}\nis not in\n{said}"
        SEEN.add(line)


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return f"error: {caught.value}"


def test_messages_about_memory(say):
    expect(say("--name", "one", *sick("memory", 3)), "window 3: out of memory")
    restart = ["--name", "a", "--faults.oom", "restart", "--checkpoint.every", "1 steps"]
    expect(say(*restart, *sick("memory", 3), code=SMALLER), "error: out of memory")
    expect(say(*restart, *sick("", 3), "--resume", "auto"), "micro-batches of 8 instead of 16")


def test_messages_about_gradients(say):
    expect(
        say("--name", "a", *sick("nan", 7, 11), code=FAILED),
        "window 7: gradient norm nan",
        "error: 11 updates",
    )
    said = say("--name", "b", "--faults.nonfinite", "raise", *sick("nan", 7), code=FAILED)
    expect(said, "error: the gradient's norm is nan")


def test_messages_about_launchers(say):
    dry = {"code": INPUT}
    expect(say("--dry_run", "--fabric.devices", "3", **dry, LOCAL_WORLD_SIZE="2"), "error: fabric.devices is 3")
    two_nodes = {"LT_DEVICES": "1", "LT_NUM_NODES": "2"}
    expect(say("--dry_run", "--fabric.num_nodes", "3", **dry, **two_nodes), "error: fabric.num_nodes is 3")
    expect(say("--dry_run", "--fabric.strategy", "ddp", **dry, LT_STRATEGY="fsdp"), "error: fabric.strategy is ddp")
    spawn = ["--dry_run", "--fabric.strategy", "ddp_spawn"]
    expect(say(*spawn, **dry, LOCAL_WORLD_SIZE="2"), "error: fabric.strategy: ddp_spawn")
    expect(say("--dry_run", **dry, SLURM_NTASKS="4"), "error: srun started 4 tasks")
    elastic = {"TORCHELASTIC_MAX_RESTARTS": "1"}
    expect(say(**dry, **elastic), "error: this launch may be restarted")
    several = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    expect(say("--name", "a", **dry, **elastic, **several), "error: --max-restarts on several nodes")
    expect(say("--fast_dev_run", "--fabric.requeue", "true"), "fabric.requeue: this is no SLURM job")


def test_messages_about_what_a_strategy_can_not_do(say, machine):
    def refuses(*keys: str) -> str:
        return say("--dry_run", *(f"--fabric.{key}" for key in keys), code=INPUT)

    expect(refuses("strategy=deepspeed"), "error: fabric.strategy: deepspeed needs a GPU")
    expect(refuses("strategy=fsdp", "devices=2", "precision=16-mixed"), "error: fabric.precision: fsdp does not take")
    split = ("--dry_run", "--fabric.strategy=fsdp", "--faults.oom=split")
    expect(say(*split, code=INPUT), "error: faults.oom: fsdp can't split")
    sharded = ("--dry_run", "--fabric.strategy=ddp", "--checkpoint.sharded=true")
    expect(say(*sharded, code=INPUT), "error: checkpoint.sharded: ddp")
    expect(say("--dry_run", "--fabric.precision=16-mixed"), "fabric.precision: 16-mixed needs a GPU")
    expect(say("--dry_run", "--fabric.precision=transformer-engine"), "fabric.precision: transformer-engine needs")
    with_gpus(machine)
    zero = ("--dry_run", "--fabric.accelerator=cuda", "--fabric.strategy=deepspeed")
    expect(say(*zero, "--clip.value=1", code=INPUT), "error: clip.value: deepspeed")
    without = (*zero, "--fabric.deepspeed.offload_parameters=true")
    expect(say(*without, code=INPUT), "error: fabric.deepspeed.offload_parameters needs")


def test_messages_about_devices(say, machine):
    expect(say("--dry_run", "--fabric.accelerator", "cuda"), "fabric.accelerator: cuda")
    with_gpus(machine, 4)
    expect(say("--dry_run", "--fabric.accelerator", "cuda", "--fabric.devices", "8"), "fabric.devices: 8 asked")


def test_messages_about_blocks(say):
    bloc = ["--fast_dev_run", "--fabric.activation_checkpointing", "[Bloc]"]
    said = say(*bloc, code=INPUT).replace("fabric.activation_checkpointing:", "fabric.fsdp.blocks:")
    expect(said, "error: fabric.fsdp.blocks")
    expect(refused(split_layers, torch.nn.Sequential(), None), "error: fabric.tensor_parallel_size: Sequential")
    network = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(4, 1)})
    expect(refused(check_resettable, network), "error: fabric.fsdp.meta_init")


def test_messages_about_a_deepspeed_configuration(say, machine):
    from fabric_trainer.zero import batch_config, engine_config

    with_gpus(machine)

    def configured(**given: Any) -> Config:
        config = Config(fabric=FabricConfig(accelerator="cuda", strategy="deepspeed"))
        config.clip.norm = 1.0
        config.fabric.deepspeed.config = given
        return config

    def engine(config: Config) -> None:
        engine_config(config, resolve(config.fabric))

    zero = ("--dry_run", "--fabric.accelerator=cuda", "--fabric.strategy=deepspeed")
    expect(say(*zero, "--fabric.deepspeed.config=ds.json", code=INPUT), "error: fabric.deepspeed.config: there is no")
    own = (*zero, "--fabric.deepspeed.config=deepspeed.json")
    expect(say(*own, "--fabric.stage=1", code=INPUT), "error: fabric.stage is 1")
    expect(say(*own, "--fabric.precision=32", code=INPUT), "error: fabric.precision is 32-true, fabric.deepspeed")
    expect(refused(engine, configured(optimizer={"type": "Adam"})), "error: fabric.deepspeed.config: leave optimizer")
    expect(refused(batch_config, configured(gradient_clipping=0.5), 1), "error: fabric.deepspeed.config: gradient_cl")
    machine.setattr("importlib.util.find_spec", lambda name: None)
    expect("\n".join(strategies.problems(configured())), "fabric.strategy: deepspeed needs the package")


def test_messages_about_keys(say):
    expect(say("--fabric.stratgy", "ddp", code=INPUT), "error: unrecognized arguments")
    expect(say("--fabric.timeout", "3 hours", code=INPUT), "error: fabric.timeout")
    batch = ["--dry_run", "--fabric.devices", "2", "--batch.global_batch_size", "100"]
    expect(say(*batch, code=INPUT), "error: batch.global_batch_size of 100")


def test_messages_about_runs_and_checkpoints(say, machine):
    say("--name", "a")
    expect(say("--name", "a", code=INPUT), "error: run runs/a exists")
    expect(say("--name", "a", "--resume", "auto"), "run a is finished")
    expect(say("--resume", "old.pt", code=INPUT), "error: --resume old.pt")
    last = ["--name", "b", "--resume", "runs/a/checkpoints/last.pt"]
    expect(say(*last, "--seed", "7", code=INPUT), "error: seed is 7")
    expect(say(*last, "--batch.micro_batch_size", "32", code=INPUT), "error: batch.*: the run has")
    expect(say(*last, "--task.args.depth", "5", code=INPUT), "error: the checkpoint is not of this network")

    import wide

    weights = {f"model.{name}": value for name, value in wide.Wide(64, 4).state_dict().items()}
    torch.save({"state_dict": weights}, "old.pt")
    expect(say("--init_from", "old.pt", code=INPUT), "error: old.pt has no 'model'")
    torch.save({"state_dict": weights, "class": wide.Wide}, "old.pt")
    expect(say("--init_from", "old.pt", code=FAILED), "error: old.pt is refused")
    os.rename("old.pt", "old.ckpt")
    exec(CONVERSION, {})
    assert "weights from weights.pt" in say("--init_from", "weights.pt", "--name", "c")

    path = Path("runs/a/checkpoints/step-00000020.pt")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    expect(say("--init_from", str(path), code=FAILED), f"error: {path} is damaged")


def test_message_of_a_full_disk(say, machine):
    def full(*arguments: Any, **keys: Any) -> None:
        raise OSError(28, os.strerror(28))

    machine.setattr(torch, "save", full)
    expect(say("--name", "a", code=FAILED), "error: could not write")


def test_messages_of_others(say, machine, tmp_path, capfd):
    machine.setitem(sys.modules, "wandb", None)
    expect(say("--loggers.wandb", "{project: wide}", code=INPUT), "error: loggers.wandb")
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    expect(capfd.readouterr().err, "SIGTERM")

    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho 'slurm_requeue error: Requested operation is presently disabled' >&2\nexit 1\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    machine.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine.setenv("SLURM_JOB_ID", "4711")
    expect(slurm.requeue(), "scontrol requeue 4711")

    with pytest.raises(ConnectionError) as caught:
        Lifeline(1, 2, lambda mine: ("127.0.0.1", 9, "token", 0)).__enter__()
    expect(str(caught.value), "rank 1 can't reach rank 0")


@pytest.mark.distributed
def test_message_of_a_rank_that_dies(two):
    assert "killed" not in two.codes
    expect(two.said, "rank 1 died without a word")


def test_message_about_unused_parameters(tmp_path):
    """torch's own: the page has its first sentence."""
    network = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
    network.forward = lambda x: network[0](x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(network)
        wrapped(torch.ones(1)).sum().backward()
        with pytest.raises(RuntimeError) as caught:
            wrapped(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()
    expect(f"RuntimeError: {caught.value}".partition(" This error")[0], "RuntimeError")


def test_every_quoted_message_was_provoked(request):
    """The last test: all the others have to have run."""
    names = {item.function.__name__ for item in request.session.items if item.path == request.path}
    wanted = {name for name in globals() if name.startswith("test_message")}
    if not wanted <= names:
        pytest.skip("needs all tests of messages to have run")
    assert quoted() == SEEN


if __name__ == "__main__":
    worker()
