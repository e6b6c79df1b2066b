"""From the configuration and a launcher's variables to a Fabric object."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy

from fabric_trainer.config import FabricConfig
from fabric_trainer.errors import InputError
from fabric_trainer.strategies import count_devices, make_fabric, problems

LAUNCHED = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_PRECISION", "LT_DEVICES", "LT_NUM_NODES")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No launcher's variable from outside, and none left behind."""
    for name in (*LAUNCHED, "LT_CLI_USED", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what make_fabric takes away
        monkeypatch.delenv(name)
    return monkeypatch


def refusal(call, config: FabricConfig) -> str:
    with pytest.raises(InputError) as caught:
        call(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(environment, variables: dict[str, str], **keys):
    for name, value in variables.items():
        environment.setenv(name, value)
    return make_fabric(FabricConfig(**{"accelerator": "cpu", **keys}))


# ---- without a launcher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, world, strategy",
    [
        ({}, 1, SingleDeviceStrategy),
        ({"strategy": "single"}, 1, SingleDeviceStrategy),
        ({"devices": 1}, 1, SingleDeviceStrategy),
        ({"devices": "1"}, 1, SingleDeviceStrategy),
        ({"devices": 2}, 2, DDPStrategy),
        ({"devices": "2", "strategy": "ddp"}, 2, DDPStrategy),
        ({"devices": 2, "num_nodes": 3}, 6, DDPStrategy),
        ({"num_nodes": 2}, 2, DDPStrategy),
    ],
)
def test_devices_and_strategy(environment, keys, world, strategy):
    fabric = made(environment, {}, **keys)
    assert type(fabric.strategy) is strategy
    assert fabric.world_size == world == count_devices(FabricConfig(**keys))


@pytest.mark.parametrize(
    "precision, own",
    [
        ("32", "32-true"),
        ("32-true", "32-true"),
        ("bf16", "bf16-mixed"),
        ("bf16-mixed", "bf16-mixed"),
        ("bf16-true", "bf16-true"),
        ("64", "64-true"),
        ("64-true", "64-true"),
    ],
)
def test_precisions(environment, precision, own):
    assert made(environment, {}, precision=precision).strategy.precision.precision == own
    assert problems(FabricConfig("cpu", precision=precision)) == []


WRONG = [
    ({"accelerator": "tpu"}, ("fabric.accelerator", "tpu", "cuda")),
    ({"strategy": "dpp"}, ("fabric.strategy", "dpp", "ddp")),
    ({"precision": "8"}, ("fabric.precision", "8", "bf16-mixed")),
    ({"precision": "fp16"}, ("fabric.precision", "fp16", "16-mixed")),
    ({"devices": "many"}, ("fabric.devices", "many", "auto")),
    ({"devices": "0,1"}, ("fabric.devices", "0,1", "list")),
    ({"devices": 0}, ("fabric.devices", "0")),
    ({"devices": []}, ("fabric.devices", "[]")),
    ({"devices": -5}, ("fabric.devices", "-5")),
    ({"devices": "-5"}, ("fabric.devices", "-5")),
    ({"devices": "--5"}, ("fabric.devices", "--5")),
]


@pytest.mark.parametrize("keys, named", WRONG)
@pytest.mark.parametrize("call", [make_fabric, problems])
def test_what_can_be_nowhere_is_named_in_one_line(call, keys, named):
    message = refusal(call, FabricConfig(**{"accelerator": "cpu", **keys}))
    assert all(part in message for part in named)


def test_single_is_for_one_device():
    assert "not 2" in refusal(make_fabric, FabricConfig("cpu", 2, strategy="single"))


@pytest.mark.parametrize("precision", ["16", "16-mixed"])
@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("auto", marks=without_gpu)])
def test_half_precision_with_a_scaler_is_not_for_cpus(accelerator, precision):
    config = FabricConfig(accelerator, precision=precision)
    message = refusal(make_fabric, config)
    assert "fabric.precision" in message and "16-mixed" in message and "bf16-mixed" in message
    assert problems(config) == [message], "a dry run lists it instead"


@without_gpu
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_a_missing_gpu_is_named(accelerator):
    config = FabricConfig(accelerator)
    message = refusal(make_fabric, config)
    assert "fabric.accelerator" in message and accelerator in message and "cpu" in message
    assert problems(config) == [message]


# ---- under a launcher -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, keys, world",
    [
        ({"LT_DEVICES": "1"}, {}, 1),
        ({"LT_DEVICES": "2"}, {}, 2),
        ({"LT_DEVICES": "2"}, {"devices": 2}, 2),
        ({"LT_DEVICES": "2"}, {"devices": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "4"}, {}, 4),
        ({"LOCAL_WORLD_SIZE": "4", "LT_DEVICES": "1"}, {}, 4),
        ({"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}, {}, 8),
        ({"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}, {"num_nodes": 2}, 8),
        ({"LT_DEVICES": "2", "LT_NUM_NODES": "3"}, {}, 6),
        ({"LT_STRATEGY": "ddp", "LT_DEVICES": "2"}, {}, 2),
        ({"LT_STRATEGY": "ddp", "LT_DEVICES": "2"}, {"strategy": "ddp"}, 2),
        ({"LT_STRATEGY": "auto", "LT_DEVICES": "2"}, {"strategy": "ddp"}, 2),
        ({"LT_ACCELERATOR": "cpu"}, {"accelerator": "auto"}, 1),
        ({"LT_ACCELERATOR": "auto"}, {"accelerator": "cpu"}, 1),
    ],
)
def test_the_launchers_processes_are_the_world(environment, variables, keys, world):
    fabric = made(environment, variables, **keys)
    assert type(fabric.strategy) is (DDPStrategy if world > 1 else SingleDeviceStrategy)
    strategy = fabric.strategy
    nodes = getattr(strategy, "num_nodes", 1)
    assert nodes * getattr(strategy, "num_processes", 1) == world
    assert fabric.accelerator.__class__.__name__ == "CPUAccelerator"


@pytest.mark.parametrize(
    "variables, keys, named",
    [
        ({"LT_DEVICES": "2"}, {"devices": 3}, ("fabric.devices", "3", "2", "auto")),
        ({"LOCAL_WORLD_SIZE": "1"}, {"devices": 2}, ("fabric.devices", "2", "1 process:")),
        ({"LT_NUM_NODES": "2", "LT_DEVICES": "1"}, {"num_nodes": 3}, ("fabric.num_nodes", "3", "2")),
        ({"LT_STRATEGY": "ddp"}, {"strategy": "single"}, ("fabric.strategy", "single", "--strategy", "ddp")),
        ({"LT_ACCELERATOR": "cuda"}, {"accelerator": "cpu"}, ("fabric.accelerator", "cpu", "cuda")),
        ({"LT_PRECISION": "bf16-mixed"}, {"precision": "64-true"}, ("fabric.precision", "64-true", "bf16-mixed")),
        ({"LT_STRATEGY": "fsdp"}, {}, ("fabric.strategy", "fsdp", "ddp")),
        ({"LT_DEVICES": "2"}, {"strategy": "single"}, ("single", "2")),
    ],
)
def test_where_launcher_and_configuration_disagree_both_are_named(environment, variables, keys, named):
    with pytest.raises(InputError) as caught:
        made(environment, variables, **keys)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in named)


@pytest.mark.parametrize("launched, configured", [("bf16-mixed", "bf16"), ("bf16", "bf16-mixed"), ("32", "32-true")])
def test_precisions_agree_under_either_name(environment, launched, configured):
    fabric = made(environment, {"LT_PRECISION": launched}, precision=configured)
    assert fabric.strategy.precision.precision in ("bf16-mixed", "32-true")


def test_the_launchers_flags_are_used_up(environment):
    flags = {
        "LT_ACCELERATOR": "cpu",
        "LT_STRATEGY": "ddp",
        "LT_PRECISION": "32",
        "LT_DEVICES": "1",
        "LT_NUM_NODES": "1",
    }
    made(environment, flags)
    assert [name for name in LAUNCHED if name in os.environ] == []


def test_callbacks_reach_fabric():
    class Callback:
        def __init__(self) -> None:
            self.calls = []

        def on_fit_end(self, **keys) -> None:
            self.calls.append(keys)

    callback = Callback()
    make_fabric(FabricConfig("cpu"), [callback]).call("on_fit_end", state=1)
    assert callback.calls == [{"state": 1}]
