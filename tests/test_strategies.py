"""From the configuration and a launcher's variables to a Fabric object."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from datetime import timedelta

import pytest
import torch
from conftest import REPOSITORY
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console

from fabric_trainer.config import Config, FabricConfig, LookaheadConfig, OtherConfig, SamConfig
from fabric_trainer.errors import InputError
from fabric_trainer.launch import STRATEGIES, Resolved
from fabric_trainer.strategies import (
    HEADINGS,
    TABLE,
    Row,
    check_strategy,
    count_devices,
    make_fabric,
    problems,
    strategy_table,
)

LAUNCHED = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_PRECISION", "LT_DEVICES", "LT_NUM_NODES")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No launcher's variable from outside, and none left behind."""
    for name in (*LAUNCHED, "LT_CLI_USED", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what make_fabric takes away
        monkeypatch.delenv(name)
    return monkeypatch


def configured(**keys) -> Config:
    """On a CPU unless said otherwise: fabric's keys by name, others as section__key."""
    config = Config(fabric=FabricConfig(accelerator="cpu"))
    for key, value in keys.items():
        target = config if "__" in key else config.fabric
        *sections, name = key.split("__")
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, name)
        setattr(target, name, value)
    return config


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(environment, variables: dict[str, str], **keys):
    for name, value in variables.items():
        environment.setenv(name, value)
    return make_fabric(configured(**keys))


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
        ({"strategy": "ddp"}, 1, DDPStrategy),
        ({"strategy": "ddp_spawn", "devices": 2}, 2, DDPStrategy),
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
    assert problems(configured(precision=precision)) == []


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
    message = refusal(call, configured(**keys))
    assert all(part in message for part in named)


def test_single_is_for_one_device():
    assert "not 2" in refusal(make_fabric, configured(devices=2, strategy="single"))


@pytest.mark.parametrize("precision", ["16", "16-mixed"])
@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("auto", marks=without_gpu)])
def test_half_precision_with_a_scaler_is_not_for_cpus(accelerator, precision):
    config = configured(accelerator=accelerator, precision=precision)
    message = refusal(make_fabric, config)
    assert "fabric.precision" in message and "16-mixed" in message and "bf16-mixed" in message
    assert problems(config) == [message], "a dry run lists it instead"


@without_gpu
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_a_missing_gpu_is_named(accelerator):
    config = configured(accelerator=accelerator)
    message = refusal(make_fabric, config)
    assert "fabric.accelerator" in message and accelerator in message and "cpu" in message
    assert problems(config) == [message]


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_keys_of_ddp_reach_it(environment):
    keys = {"ddp__static_graph": True, "ddp__gradient_as_bucket_view": False, "timeout": 0.5}
    strategy = made(
        environment, {}, devices=2, **{f"fabric__{key}" if "__" in key else key: v for key, v in keys.items()}
    )
    assert strategy.strategy._timeout == timedelta(seconds=30)
    assert strategy.strategy._ddp_kwargs == {
        "find_unused_parameters": False,
        "static_graph": True,
        "gradient_as_bucket_view": False,
    }


@pytest.mark.parametrize("strategy, method", [("ddp", "popen"), ("ddp_spawn", "spawn"), ("ddp_notebook", "fork")])
def test_how_ddp_starts_its_processes(environment, strategy, method):
    assert made(environment, {}, devices=2, strategy=strategy).strategy._start_method == method


def test_the_launchers_flag_for_unused_parameters(environment):
    fabric = made(environment, {"LT_STRATEGY": "ddp_find_unused_parameters_true", "LT_DEVICES": "2"}, strategy="ddp")
    assert fabric.strategy._ddp_kwargs["find_unused_parameters"] is True


def test_precision_of_float32_products(environment):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        made(environment, {}, matmul_precision="high", cudnn_tf32=False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", False)
        made(environment, {})
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("strategy", ["fsdp", "tensor_parallel"])
def test_sharded_strategies(environment, strategy, precision):
    fabric = made(environment, {}, strategy=strategy, devices=2, precision=precision)
    assert fabric.world_size == 2 and fabric.strategy.precision.precision == precision


# ---- what each strategy can do --------------------------------------------------------------------------------------


def resolved(strategy: str, **keys) -> Resolved:
    world = 1 if strategy == "single" else 2
    plain = {"accelerator": "cuda", "devices": world, "num_nodes": 1, "precision": "32-true", "world_size": world}
    return Resolved(strategy, **{**plain, **keys})


def test_every_strategy_has_a_row_and_every_column_a_heading():
    assert set(TABLE) == set(STRATEGIES) - {"auto"}
    assert set(HEADINGS) == {field.name for field in fields(Row)}


@pytest.mark.parametrize("strategy", TABLE)
def test_plain_configurations_averages_and_plateaus_are_for_all(strategy):
    check_strategy(configured(), resolved(strategy))
    check_strategy(configured(ema__decay=0.9, clip__norm=1.0, schedule__name="plateau"), resolved(strategy))
    check_strategy(configured(stage=3, fabric__deepspeed__offload_optimizer=True), resolved(strategy))
    for precision in TABLE[strategy].precisions:
        check_strategy(configured(), resolved(strategy, precision=precision))


SHARDED = ("fsdp", "fsdp1", "tensor_parallel", "deepspeed")
REFUSED = {
    "clip.value": (("deepspeed",), {"clip__value": 1.0}, {}, ("clip.norm",)),
    "clip.p": (("deepspeed",), {"clip__p": 1.0}, {}, ("2-norm", "1.0")),
    "clip.agc": (("fsdp1", "deepspeed"), {"clip__agc": 0.01}, {}, ("clip.norm",)),
    "faults.spike": (("deepspeed",), {"faults__spike": 5.0}, {}, ("fsdp1",)),
    "optim.name: fsdp1": (("fsdp1",), {"optim__name": "muon_hybrid"}, {}, ("muon_hybrid", "adamw, adamax")),
    "optim.name: deepspeed": (("deepspeed",), {"optim__name": "muon_hybrid"}, {}, ("muon_hybrid", "adamw")),
    "optim.name": (("fsdp1", "deepspeed"), {"optim__others": [OtherConfig(["a"], "lamb")]}, {}, ("lamb",)),
    "optim.others": (("deepspeed",), {"optim__others": [OtherConfig(["a"], "sgd")]}, {}, ("one optimizer",)),
    "optim.lookahead": (("fsdp1", "deepspeed"), {"optim__lookahead": LookaheadConfig()}, {}, ("tensor_parallel can",)),
    "optim.sam": (SHARDED, {"optim__sam": SamConfig()}, {}, ("single, ddp, ddp_spawn and ddp_notebook can",)),
    "fabric.strategy": (("fsdp1", "deepspeed"), {}, {"accelerator": "cpu"}, ("needs a GPU", "fsdp")),
    "checkpoint.sharded": (
        ("single", "ddp", "ddp_spawn", "ddp_notebook", "fsdp1", "deepspeed"),
        {"checkpoint__sharded": True},
        {},
        ("fsdp and tensor_parallel",),
    ),
    "faults.oom": (SHARDED, {"faults__oom": "split"}, {}, ("restart",)),
    "fabric.accelerator": (tuple(set(TABLE) - {"single"}), {}, {"accelerator": "mps"}, ("mps", "single")),
    "fabric.precision: fsdp": (("fsdp",), {}, {"precision": "16-mixed"}, ("bf16-mixed needs no scaler",)),
    "fabric.precision: tensor": (("tensor_parallel",), {}, {"precision": "16-mixed"}, ("bf16-mixed needs no scaler",)),
    "fabric.precision": (("fsdp1", "deepspeed"), {}, {"precision": "64-true"}, ("64-true", "32-true")),
    "fabric.tensor_parallel_size of 3": (
        ("fsdp", "tensor_parallel"),
        {"tensor_parallel_size": 3},
        {"tensor_parallel_size": 3, "world_size": 4},
        ("4",),
    ),
    "fabric.tensor_parallel_size of 2": (
        ("ddp", "deepspeed", "fsdp1"),
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2},
        ("tensor_parallel and fsdp",),
    ),
    "fabric.deepspeed.offload_parameters": (
        ("deepspeed",),
        {"fabric__deepspeed__offload_parameters": True},
        {},
        ("stage 3", "2"),
    ),
    "compile.scope": (("deepspeed",), {"compile__scope": "whole"}, {"stage": 2}, ("stage 1, not 2", "fsdp")),
    "fabric.activation_checkpointing": (
        ("tensor_parallel", "fsdp"),
        {"compile__scope": "blocks", "fabric__activation_checkpointing": ["Block"]},
        {"tensor_parallel_size": 2},
        ("compile.scope none",),
    ),
    "fabric.ddp.sync_batchnorm": (("ddp",), {"fabric__ddp__sync_batchnorm": True}, {"accelerator": "cpu"}, ("GPU",)),
    "fabric.fsdp.cpu_offload": (("fsdp",), {"fabric__fsdp__cpu_offload": True}, {"accelerator": "cpu"}, ("host",)),
    "fabric.fsdp.meta_init": (
        ("single", "ddp", "tensor_parallel", "deepspeed"),
        {"fabric__fsdp__meta_init": True},
        {},
        ("fsdp and fsdp1",),
    ),
    "freeze.strategy: under fsdp1": (("fsdp1",), {"freeze__strategy": "progressive"}, {}, ("progressive", "fsdp and")),
    "freeze.fixed.phase1_epochs": (
        ("fsdp1",),
        {"freeze__strategy": "fixed", "freeze__fixed__phase1_epochs": 2},
        {},
        ("under fsdp and all others",),
    ),
    "freeze.strategy: advanced": (("deepspeed",), {"freeze__strategy": "advanced"}, {"stage": 3}, ("1 or 2",)),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_strategy_can_not_do_is_one_line(key):
    strategies, keys, found, named = REFUSED[key]
    for strategy in strategies:
        line = refusal(check_strategy, configured(**keys), resolved(strategy, **found))
        assert line.startswith(key) and all(part in line for part in named), line


def test_what_the_others_can_do():
    for strategy in set(TABLE) - {"deepspeed"}:
        check_strategy(configured(clip__value=1.0, clip__p=1.0), resolved(strategy))
    for strategy in set(TABLE) - set(SHARDED):
        check_strategy(configured(faults__oom="split"), resolved(strategy))
        check_strategy(configured(faults__oom="restart"), resolved(strategy))
    for strategy in ("fsdp", "tensor_parallel"):
        check_strategy(configured(checkpoint__sharded=True), resolved(strategy, accelerator="cpu"))
    for strategy in TABLE:
        check_strategy(configured(compile__scope="whole"), resolved(strategy, stage=1))
    config = configured(fabric__deepspeed__offload_parameters=True)
    check_strategy(config, resolved("deepspeed", stage=3))
    check_strategy(config, resolved("fsdp"))


def test_a_dry_run_refuses_what_no_machine_could_do():
    assert "single is for one device, not 2" in refusal(problems, configured(devices=2, strategy="single"))
    assert "does not divide" in refusal(problems, configured(devices=3, strategy="fsdp", tensor_parallel_size=2))


def test_a_missing_deepspeed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problems(configured(), resolved("deepspeed"))[-1] == (
        "fabric.strategy: deepspeed needs the package deepspeed: make install-deepspeed, "
        "or pip install --no-build-isolation deepspeed"
    )


def test_data_parallel_ranks_are_what_the_batch_is_cut_over():
    assert count_devices(FabricConfig("cpu", 4, strategy="fsdp", tensor_parallel_size=2)) == 2
    assert count_devices(FabricConfig("cpu", 4, strategy="tensor_parallel")) == 1


def test_the_table_names_everything():
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(strategy_table())
    text = console.export_text()
    assert all(word in text for word in (*TABLE, *HEADINGS.values(), "every", "transformer-engine"))
    assert "…" not in text


def test_printing_the_table_needs_neither_torch_nor_a_configuration(tmp_path):
    program = """
import sys
from fabric_trainer.cli import main
code = main(["--strategies"])
print(code, sorted({name.split(".")[0] for name in sys.modules} & {"torch", "lightning"}))
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "0 []", run.stderr
    assert "tensor_parallel" in run.stdout


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
        ({"LT_STRATEGY": "fsdp"}, {"strategy": "ddp"}, ("fabric.strategy", "fsdp", "ddp")),
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
    make_fabric(configured(), [callback]).call("on_fit_end", state=1)
    assert callback.calls == [{"state": 1}]
