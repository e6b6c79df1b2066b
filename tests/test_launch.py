"""What will run: every launcher flag against its configuration key."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fabric_trainer.config import FabricConfig, FsdpConfig
from fabric_trainer.errors import InputError
from fabric_trainer.launch import ACCELERATORS, ALIASES, PRECISIONS, STRATEGIES, device_problems, resolve

# what `fabric run` takes for each flag
FABRIC_STRATEGIES = (
    *("ddp", "ddp_find_unused_parameters_true", "dp", "fsdp", "deepspeed"),
    *("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
)
FABRIC_ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "tpu", "auto")
FABRIC_PRECISIONS = (
    *("transformer-engine", "transformer-engine-float16", "16-true", "16-mixed", "bf16-true", "bf16-mixed"),
    *("32-true", "64-true", "64", "32", "16", "bf16"),
)
VARIABLES = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_PRECISION", "LT_DEVICES", "LT_NUM_NODES")
SCHEDULERS = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_NAME")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No launcher's variable from outside; two processes would be started by none."""
    for name in (*VARIABLES, *SCHEDULERS, "LT_CLI_USED", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def answer(environment, variables: dict[str, str], **keys):
    """What is resolved, or the one line that refuses it."""
    for name, value in variables.items():
        environment.setenv(name, value)
    try:
        return resolve(FabricConfig(**{"accelerator": "cpu", **keys}))
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)


def refusal(environment, variables: dict[str, str], **keys) -> str:
    line = answer(environment, variables, **keys)
    assert isinstance(line, str)
    return line


# ---- flag x key, the whole product ----------------------------------------------------------------------------------


@pytest.mark.parametrize("launched, configured", product(FABRIC_STRATEGIES, STRATEGIES))
def test_strategy_flag_and_key(environment, launched, configured):
    found = answer(environment, {"LT_STRATEGY": launched}, strategy=configured, devices=2)
    named = "deepspeed" if launched.startswith("deepspeed") else "ddp" if "ddp" in launched else launched
    stage = int(launched[-1]) if launched[-1].isdigit() else 2
    fits = configured == "auto" or (configured == named and (named != "deepspeed" or stage == 2))
    if launched == "dp" or not fits:
        assert isinstance(found, str) and launched in found
        assert launched == "dp" or configured in found or "fabric.stage is 2" in found
        return
    assert (found.strategy, found.stage) == (named, stage)
    assert found.find_unused_parameters == ("unused" in launched)


@pytest.mark.parametrize("launched, configured", product(FABRIC_ACCELERATORS, (*ACCELERATORS, "tpu")))
def test_accelerator_flag_and_key(environment, launched, configured):
    found = answer(environment, {"LT_ACCELERATOR": launched}, accelerator=configured)
    if "tpu" in (launched, configured):
        assert "tpu" in found and "must be one of auto, cpu, cuda, gpu, mps" in found
        return
    kinds = {"auto": None, "gpu": "mps" if torch.backends.mps.is_available() else "cuda"}
    wanted = {kinds.get(name, name) for name in (launched, configured)} - {None}
    if len(wanted) == 2:
        assert f"fabric.accelerator is {configured}" in found and f"--accelerator is {launched}" in found
    elif wanted:
        assert {found.accelerator} == wanted
    else:
        assert found.accelerator in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("launched, configured", product(FABRIC_PRECISIONS, PRECISIONS))
def test_precision_flag_and_key(environment, launched, configured):
    found = answer(environment, {"LT_PRECISION": launched}, precision=configured)
    if launched not in PRECISIONS:
        assert f"not {launched}" in found
    elif configured == "auto" or PRECISIONS[launched] == PRECISIONS[configured]:
        assert found.precision == PRECISIONS[launched]
    else:
        assert f"fabric.precision is {configured}" in found and f"--precision is {launched}" in found


@pytest.mark.parametrize("configured", ["auto", 1, 2, "2", 3, [0, 1], [0, 1, 2], -1])
@pytest.mark.parametrize("started", [1, 2])
def test_devices_flag_and_key(environment, started, configured):
    variables = {"LT_DEVICES": str(started), "LOCAL_WORLD_SIZE": str(started)}
    found = answer(environment, variables, devices=configured)
    count = len(configured) if isinstance(configured, list) else 1 if configured == -1 else configured
    if configured == "auto" or int(count) == started:
        assert found.world_size == started
    else:
        assert f"fabric.devices is {configured}" in found and f"started {started} process" in found


@pytest.mark.parametrize("started, configured", product((1, 2), (1, 2, 3)))
def test_num_nodes_flag_and_key(environment, started, configured):
    found = answer(environment, {"LT_DEVICES": "1", "LT_NUM_NODES": str(started)}, num_nodes=configured)
    if configured in (1, started):  # 1 is what nobody has to write
        assert (found.num_nodes, found.world_size) == (started, started)
    else:
        assert f"fabric.num_nodes is {configured} and the launcher started {started}" in found


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "devices, name", [(1, "single"), ("1", "single"), (2, "ddp"), ([0, 1], "ddp"), ([3], "single")]
)
def test_auto_is_single_on_one_device_and_ddp_on_several(environment, devices, name):
    assert answer(environment, {}, devices=devices).strategy == name
    assert answer(environment, {}, devices=devices, strategy="fsdp").strategy == "fsdp"


def test_nothing_sharded_is_ddp_and_says_so(environment):
    found = answer(environment, {}, strategy="fsdp", fsdp=FsdpConfig("NO_SHARD"), devices=2)
    assert found.strategy == "ddp" and "NO_SHARD" in found.notes[0] and "ddp" in found.notes[0]
    assert answer(environment, {}, strategy="fsdp", fsdp=FsdpConfig("SHARD_GRAD_OP")).notes == ()


def test_the_launchers_stage_where_the_strategy_is_open(environment):
    variables = {"LT_STRATEGY": "deepspeed_stage_3"}
    assert answer(environment, variables, stage=1).stage == 3
    assert answer(environment, variables, strategy="deepspeed", stage=3).stage == 3
    line = refusal(environment, variables, strategy="deepspeed")
    assert "fabric.stage is 2" in line and "deepspeed_stage_3" in line
    assert answer(environment, {"LT_STRATEGY": "deepspeed"}, strategy="deepspeed", stage=1).stage == 1


def test_fabrics_own_names_are_no_keys(environment):
    for name in (*ALIASES, "dp", "ddp_fork"):
        assert f"fabric.strategy must be one of {', '.join(STRATEGIES)}, not {name}" == refusal(
            environment, {}, strategy=name
        )


@pytest.mark.parametrize(
    "strategy, wanted, devices, shared, data",
    [
        ("tensor_parallel", None, 4, 4, 1),
        ("tensor_parallel", 2, 4, 2, 2),
        ("fsdp", None, 4, 1, 4),
        ("fsdp", 2, 4, 2, 2),
        ("ddp", None, 4, 1, 4),
    ],
)
def test_who_shares_layers_and_who_shares_data(environment, strategy, wanted, devices, shared, data):
    found = answer(environment, {}, strategy=strategy, tensor_parallel_size=wanted, devices=devices)
    assert (found.tensor_parallel_size, found.data_parallel_size) == (shared, data)


# ---- launchers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_notebook"])
def test_a_strategy_that_starts_processes_is_not_for_a_launcher(environment, name):
    assert answer(environment, {}, strategy=name, devices=2).strategy == name
    line = refusal(environment, {"LOCAL_WORLD_SIZE": "2"}, strategy=name)
    assert f"fabric.strategy: {name} starts its processes itself" in line and "ddp" in line


@pytest.mark.parametrize(
    "variables, world, nodes",
    [
        ({"SLURM_NTASKS": "1"}, 1, 1),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1"}, 4, 1),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}, 8, 2),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "interactive"}, 1, 1),
        # torchrun inside a job: its processes count
        ({"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}, 8, 2),
    ],
)
def test_sruns_tasks_are_the_world(environment, variables, world, nodes):
    found = answer(environment, variables)
    assert (found.world_size, found.num_nodes) == (world, nodes)


def test_srun_must_say_how_many_tasks_a_node_has(environment):
    assert "--ntasks-per-node" in refusal(environment, {"SLURM_NTASKS": "4"})
    assert "fabric.devices is 2 and the launcher started 1 process:" in refusal(
        environment, {"SLURM_NTASKS": "1"}, devices=2
    )


def test_the_launcher_may_name_devices(environment):
    variables = {"LT_DEVICES": "1,3", "LOCAL_WORLD_SIZE": "2"}
    assert answer(environment, variables).devices == [1, 3]
    assert answer(environment, variables, devices=2).devices == [1, 3]
    assert answer(environment, variables, devices=[1, 3]).devices == [1, 3]
    line = refusal(environment, variables, devices=[0, 1])
    assert "fabric.devices is [0, 1]" in line and "[1, 3]" in line
    environment.setenv("LT_DEVICES", "2")
    assert answer(environment, {}, devices=[2, 5]).devices == [2, 5], "which of them is the configuration's to say"


@pytest.mark.parametrize("devices", ["many", "0,1", 0, [], -5, "-5", "--5", [0, 0], [-1, 0]])
def test_devices_that_can_not_be(environment, devices):
    line = refusal(environment, {}, devices=devices)
    assert "fabric.devices must" in line and str(devices) in line


# ---- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"precision": "16-mixed"}, ("fabric.precision: 16-mixed", "bf16-mixed")),
        ({"precision": "16"}, ("fabric.precision: 16-mixed", "bf16-mixed")),
        ({"precision": "transformer-engine"}, ("transformer-engine needs a CUDA device", "transformer_engine")),
        ({"devices": [0, 1]}, ("fabric.devices: [0, 1]", "2")),
        ({"accelerator": "mps", "precision": "64"}, ("fabric.precision: 64-true", "32-true")),
    ],
)
def test_what_a_device_lacks_is_one_line(environment, keys, named):
    *_, line = device_problems(answer(environment, {}, **keys))
    assert all(part in line for part in named)


@pytest.mark.parametrize("count, wanted, lacking", [(2, 2, 0), (2, 3, 1), (2, [1], 0), (2, [2], 1), (2, -1, 0)])
def test_devices_are_counted(environment, count, wanted, lacking):
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: count)
    found = answer(environment, {}, accelerator="cuda", devices=wanted)
    assert len(device_problems(found)) == lacking
    assert wanted != -1 or found.world_size == 2
    assert answer(environment, {}, accelerator="cpu", devices=-1).world_size == 1


def test_transformer_engine_where_it_is_installed(environment):
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 1)
    found = answer(environment, {}, accelerator="cuda", precision="transformer-engine")
    environment.setattr("importlib.util.find_spec", lambda name: object())
    assert device_problems(found) == []
    environment.setattr("importlib.util.find_spec", lambda name: None)
    assert "the package transformer_engine" in device_problems(found)[0]
