"""The configuration: what it accepts, how it complains, and that it needs no torch to do so."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fabric_trainer.batch import divided, rescaled, resolve_accumulate
from fabric_trainer.checks import check
from fabric_trainer.command import load, parse
from fabric_trainer.config import BatchConfig, Config, FsdpConfig, data_root, flatten, to_yaml
from fabric_trainer.errors import InputError
from fabric_trainer.order import check_accumulate

BASE = "run: {max_steps: 5}\n"
REPOSITORY = Path(__file__).resolve().parent.parent


def parsed(folder: Path, text: str = BASE, *arguments: str) -> Config:
    return command(folder, text, *arguments)[1]


def command(folder: Path, text: str, *arguments: str):
    path = folder / "some.yaml"
    path.write_text(text)
    return parse([f"--config={path}", *arguments])


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(**values) -> Config:
    config = Config()
    config.run.max_steps = 5
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            assert hasattr(getattr(config, section), name)
            setattr(getattr(config, section), name, value)
        else:
            setattr(config, section, value)
    return config


def test_neither_torch_nor_lightning_is_imported(tmp_path):
    (tmp_path / "some.yaml").write_text(BASE + "optim: {lr: 1e-3}\n")
    program = f"""
import sys
from fabric_trainer.command import InputError, parse
command, parsed = parse(["--config={tmp_path}/some.yaml", "--optim.lr=1e-4", "--dry_run"])
assert parsed.optim.lr == 1e-4 and command.dry_run
try:
    parse(["--config={tmp_path}/some.yaml", "--optim.lrr=1e-4"])
except InputError:
    print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"torch", "lightning", "torchmetrics", "wandb"}}))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# ---- keys and types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, named",
    [
        ("foo: 1", "foo"),
        ("optim: {lrr: 1}", "lrr"),
        ("optim: {lr: fast}", "optim.lr"),
        ("batch: {micro_batch_size: 2.5}", "batch.micro_batch_size"),
        ("batch: {micro_batch_size: many}", "batch.micro_batch_size"),
        ("batch: {accumulate: 2.5}", "batch.accumulate"),
        ("batch: 5", "batch"),
        ("optim: [1]", "optim"),
        ("seed: true", "seed"),
        ("schedule: {name: cosin}", "schedule.name"),
        ("faults: {nonfinite: ignore}", "faults.nonfinite"),
        ("evaluate: {every: 5}", "evaluate.every"),
        ("loggers: {wandb: {projekt: x}}", "projekt"),
        ("fabric: {ddp: 5}", "fabric.ddp"),
        ("fabric: {ddp: {statik: true}}", "statik"),
        ("fabric: {fsdp: {sharding: HYBRID}}", "fabric.fsdp.sharding"),
        ("fabric: {stage: 4}", "fabric.stage"),
        ("fabric: {fsdp: {param_dtype: fp8}}", "fabric.fsdp.param_dtype"),
        ("fabric: {matmul_precision: higher}", "fabric.matmul_precision"),
        ("faults: {oom: ignore}", "faults.oom"),
        (": : [", "config"),
    ],
)
def test_wrong_keys_and_types_are_named_in_one_line(tmp_path, text, named):
    assert named in refusal(parsed, tmp_path, BASE + text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--opt.lr=1"],
        ["--optim.l=1"],
        ["--fabric.ddp.static", "true"],
        ["--res", "auto"],
        ["--over"],
        ["--dry"],
        ["--strat"],
        ["stray"],
        ["--optim.lrr", "1"],
        ["--fabric.ddp.statik", "1"],
    ],
)
def test_nothing_is_abbreviated_or_ignored_on_the_command_line(tmp_path, arguments):
    assert arguments[0] in refusal(parsed, tmp_path, BASE, *arguments)


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yaml" in refusal(parse, ["--config", str(tmp_path / "nowhere.yaml")])


def test_a_choice_is_answered_with_the_choices(tmp_path):
    message = refusal(parsed, tmp_path, BASE + "schedule: {name: cosin}")
    assert all(name in message for name in ("cosin", "cosine", "one_cycle", "plateau"))


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("1E-4", 1e-4), ("2", 2.0), ("1.5e2", 150.0), (".5", 0.5)])
def test_numbers_read_alike_in_yaml_and_on_the_command_line(tmp_path, text, value):
    for config in (parsed(tmp_path, BASE + f"optim: {{lr: {text}}}"), parsed(tmp_path, BASE, f"--optim.lr={text}")):
        assert type(config.optim.lr) is float and config.optim.lr == value
    config = parsed(tmp_path, BASE + f"optim: {{args: {{eps: {text}}}}}")
    assert config.optim.args == {"eps": value} and not isinstance(config.optim.args["eps"], str)


def test_configurations_share_nothing(tmp_path):
    """The parser is kept, with its defaults."""
    text = BASE + "optim: {others: [{match: [head]}], args: {eps: 1.0}}"
    first, second = (parsed(tmp_path, text) for _ in range(2))
    before = asdict(second)
    first.optim.args["eps"], first.task.args["width"], first.clip.agc_exempt[:] = 2.0, 8, ["head"]
    first.freeze.schedule[0], first.callbacks[:] = [], ["a.B"]
    first.optim.others[0].match.append("embed")
    assert asdict(second) == before == asdict(parsed(tmp_path, text))
    assert parsed(tmp_path).optim.others == [] and parsed(tmp_path) == parsed(tmp_path)


def test_infinity_for_the_largest_element(tmp_path):
    assert parsed(tmp_path, BASE + "clip: {p: .inf}").clip.p == math.inf
    assert parsed(tmp_path, BASE, "--clip.p=.inf").clip.p == math.inf


def test_the_command_line_wins_and_says_what_it_set(tmp_path):
    made, config = command(
        tmp_path, BASE + "batch: {accumulate: 2}\n", "--batch.accumulate", "4", "--seed=7", "--resume", "auto"
    )
    assert (config.batch.accumulate, config.seed) == (4, 7)
    assert made.given == {"batch.accumulate", "seed"}
    assert (made.resume, made.config_name, made.overwrite, made.split) == ("auto", "some", False, "val")


# ---- sections in sections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("fabric.ddp.static_graph", "true", True),
        ("fabric.fsdp.blocks", "[Block, Head]", ["Block", "Head"]),
        ("fabric.fsdp.blocks", "1000000", 1_000_000),
        ("fabric.fsdp.reduce_dtype", "fp32", "fp32"),
        ("fabric.deepspeed.config", "zero.json", "zero.json"),
        ("fabric.deepspeed.config", '{"bf16": {"enabled": "auto"}}', {"bf16": {"enabled": "auto"}}),
        ("fabric.activation_checkpointing", "[Block]", ["Block"]),
        ("fabric.stage", "3", 3),
        ("fabric.tensor_parallel_size", "2", 2),
        ("checkpoint.sharded", "true", True),
        ("faults.oom", "restart", "restart"),
    ],
)
def test_nested_keys_read_alike_and_read_back(tmp_path, key, text, value):
    *sections, name = key.split(".")
    nested = f"{name}: {text}"
    for section in reversed(sections):
        nested = f"{section}: {{{nested}}}"
    made, from_command = command(tmp_path, BASE, f"--{key}", text)
    assert made.given == {key}
    for config in (parsed(tmp_path, BASE + nested), from_command):
        target = config
        for section in sections:
            target = getattr(target, section)
        assert getattr(target, name) == value
        (tmp_path / "written.yaml").write_text(to_yaml(config))
        assert load(tmp_path / "written.yaml") == config


# ---- what to do -----------------------------------------------------------------------------------------------------


def test_predictions_need_a_place(tmp_path):
    made, _ = command(tmp_path, BASE, "--predict", "best", "--out", "found.pt", "--split", "test")
    assert (made.predict, made.out, made.split) == ("best", "found.pt", "test")
    assert "--predict best needs --out FILE" in refusal(parsed, tmp_path, BASE, "--predict=best")
    assert "--out found.pt" in refusal(parsed, tmp_path, BASE, "--out", "found.pt")
    line = refusal(parsed, tmp_path, BASE, "--predict=best", "--out=found.pt", "--evaluate=best")
    assert "--predict and --evaluate" in line


def test_the_table_of_strategies_needs_no_file(tmp_path):
    assert parse(["--strategies", f"--config={tmp_path}/nowhere.yaml"])[0].strategies


# ---- batch ----------------------------------------------------------------------------------------------------------

RIGHT = ("{window: {0: 8, 500: 4}}", "{epoch: {0: 8, 5: 4}}")


@pytest.mark.parametrize("value", [{0: 8, 500: 4}, {"window": {0: 8}, "epoch": {0: 8}}, {"step": {0: 8}}, {}])
def test_a_mapping_without_its_clock_is_answered_with_both_right_forms(value):
    message = refusal(check, changed(batch__accumulate=value))
    assert all(right in message for right in RIGHT) and str(value) in message


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        {"window": 8},
        {"window": {}},
        {"window": {5: 4}},
        {"window": {0: 0}},
        {"window": {0: 8, -1: 2}},
        {"window": {0: 8, 5: None}},
        {"window": {0: 8, "a": 4}},
        {"window": {0: 2.5}},
        {"epoch": {0: "8"}},
        {"epoch": {0: True}},
    ],
)
def test_wrong_accumulations(value):
    message = refusal(check, changed(batch__accumulate=value))
    assert all(right in message for right in RIGHT)


@pytest.mark.parametrize("value", [1, 8, {"window": {0: 8, 500: 4}}, {"epoch": {0: 8, 5: 4}}])
def test_right_accumulations_from_yaml_and_the_command_line(tmp_path, value):
    check_accumulate(value)
    flow = yaml.safe_dump(value, default_flow_style=True).replace("\n...", "").strip()
    assert parsed(tmp_path, BASE + f"batch: {{accumulate: {flow}}}").batch.accumulate == value
    assert parsed(tmp_path, BASE, f"--batch.accumulate={flow}").batch.accumulate == value


def test_accumulation_follows_from_the_global_batch():
    assert resolve_accumulate(BatchConfig(8, 1, 96), 3) == 4
    assert resolve_accumulate(BatchConfig(8, 5), 3) == 5
    message = refusal(resolve_accumulate, BatchConfig(8, 2, 96), 3)
    assert "batch.accumulate" in message and "batch.global_batch_size" in message


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 30), st.integers(1, 8))
def test_what_does_not_divide_is_answered_with_the_nearest_that_do(total, micro, ranks):
    step = micro * ranks
    if total % step == 0:
        assert divided(total, micro, ranks, "batch.global_batch_size") * step == total
        return
    message = refusal(divided, total, micro, ranks, "batch.global_batch_size")
    below, above = total // step * step, (total // step + 1) * step
    near = f"{below} or {above}" if below else f"{above}"
    assert message.endswith(f"the nearest that do: {near}")
    assert f"batch.global_batch_size of {total}" in message


# ---- resuming on another world --------------------------------------------------------------------------------------


def saved(micro: int, accumulate, world: int) -> dict:
    return {"micro_batch_size": micro, "accumulate": accumulate, "world_size": world}


@settings(max_examples=100, deadline=None)
@given(
    micro=st.integers(1, 8),
    accumulate=st.one_of(
        st.integers(1, 8),
        st.dictionaries(st.integers(1, 9), st.integers(1, 8), max_size=2).map(lambda d: {"epoch": {0: 3, **d}}),
    ),
    before=st.integers(1, 8),
    now=st.integers(1, 8),
)
def test_the_effective_batch_of_every_entry_is_kept(micro, accumulate, before, now):
    entries = [accumulate] if isinstance(accumulate, int) else list(accumulate["epoch"].values())
    run, batch = saved(micro, accumulate, before), BatchConfig(micro, accumulate)
    if any(entry * before % now for entry in entries):
        message = refusal(rescaled, run, batch, now, False)
        assert "does not divide" in message and "the nearest that do" in message
        return
    found = rescaled(run, batch, now, False)
    if isinstance(accumulate, int):
        assert found * micro * now == accumulate * micro * before
    else:
        assert found["epoch"].keys() == accumulate["epoch"].keys()
        assert all(found["epoch"][k] * now == v * before for k, v in accumulate["epoch"].items())


def test_a_command_that_sets_the_batch_must_make_the_same_one():
    run = saved(4, 4, 2)  # 32
    assert rescaled(run, BatchConfig(8, 2), 2, given=True) == 2
    assert rescaled(run, BatchConfig(8, 4), 1, given=True) == 4
    assert rescaled(run, BatchConfig(8, 1, 32), 1, given=True) == 4
    message = refusal(rescaled, run, BatchConfig(4, 4), 1, True)
    assert "32" in message and "16" in message
    assert rescaled(run, BatchConfig(4, 4), 1, given=False) == 8, "the configuration is the run's own"
    assert "64" in refusal(rescaled, run, BatchConfig(8, 4), 2, False), "the configuration is another one"
    assert "64" in refusal(rescaled, run, BatchConfig(4, 1, 64), 1, True)


# ---- values that no run can have ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, named",
    [
        ({"batch__micro_batch_size": 0}, "batch.micro_batch_size"),
        ({"run__log_every_n_steps": 0}, "run.log_every_n_steps"),
        ({"checkpoint__keep_last": 0}, "checkpoint.keep_last"),
        ({"data__num_workers": -1}, "data.num_workers"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed must be at least 0, not None"),
        ({"checkpoint__every": None}, "checkpoint.every"),
        ({"evaluate__every": "often"}, "evaluate.every"),
        ({"checkpoint__every": "0 steps"}, "checkpoint.every"),
        ({"checkpoint__keep_every": "1.5 steps"}, "checkpoint.keep_every"),
        ({"clip__norm": 1.0, "clip__value": 1.0}, "clip.norm and clip.value"),
        ({"run__max_steps": None}, "run.max_epochs or run.max_steps"),
        ({"schedule__name": "plateau"}, "checkpoint.monitor"),
        ({"ema__decay": 1.0}, "ema.decay"),
        ({"ema__decay": -0.1}, "ema.decay"),
        # without a check: a traceback, a sign turned round, or silence
        ({"run__max_steps": 0}, "run.max_steps"),
        ({"run__max_steps": -1}, "run.max_steps"),
        ({"run__max_epochs": 0}, "run.max_epochs"),
        ({"schedule__warmup": -3}, "schedule.warmup"),
        ({"schedule__name": "step", "schedule__every": 0}, "schedule.every"),
        ({"evaluate__micro_batch_size": 0}, "evaluate.micro_batch_size"),
        ({"evaluate__micro_batch_size": -1}, "evaluate.micro_batch_size"),
        ({"batch__global_batch_size": 0}, "batch.global_batch_size"),
        ({"batch__accumulate": 2, "batch__global_batch_size": 64}, "batch.global_batch_size"),
        ({"clip__norm": -1.0}, "clip.norm"),
        ({"clip__norm": 0.0}, "clip.norm"),
        ({"clip__value": -1.0}, "clip.value"),
        ({"clip__p": 0.0}, "clip.p"),
        ({"faults__budget": -1}, "faults.budget"),
        ({"checkpoint__top_k": -1}, "checkpoint.top_k"),
        ({"fabric__num_nodes": 0}, "fabric.num_nodes"),
        ({"fabric__timeout": 0.0}, "fabric.timeout"),
        ({"fabric__timeout": math.inf}, "fabric.timeout"),
        ({"fabric__timeout": math.nan}, "fabric.timeout"),
        ({"fabric__tensor_parallel_size": 0}, "fabric.tensor_parallel_size"),
        ({"fabric__fsdp": FsdpConfig(blocks=0)}, "fabric.fsdp.blocks"),
        ({"fabric__fsdp": FsdpConfig(blocks=[])}, "fabric.fsdp.blocks"),
    ],
)
def test_values_that_no_run_can_have(values, named):
    assert named in refusal(check, changed(**values))


def test_the_defaults_are_fine_once_the_length_is_known():
    check(changed())
    check(changed(run__max_steps=None, run__max_epochs=1))
    check(changed(schedule__name="plateau", checkpoint__monitor="val/loss", clip__p=math.inf, ema__decay=0.0))


# ---- writing and reading back ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("config") / "written.yaml"


numbers = st.floats(1e-12, 1e12)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])  # a load takes 0.2 s
@given(
    lr=numbers,
    args=st.dictionaries(st.from_regex("[a-z_]{1,8}", fullmatch=True), st.one_of(numbers, st.booleans(), st.none())),
    clip=st.none() | numbers,
    p=st.sampled_from([1.0, 2.0, math.inf]),
    accumulate=st.sampled_from([1, 7, {"window": {0: 8, 500: 4}}, {"epoch": {0: 2}}]),
    devices=st.sampled_from(["auto", 3, [0, 2]]),
    name=st.none() | st.from_regex("[A-Za-z][A-Za-z0-9_.-]{0,12}", fullmatch=True),
    root=st.none() | st.text("abc /:'\"{}[]&*!|>%@`,äß").map("/data".__add__),
    every=st.sampled_from(["100 steps", "0.5 epochs", "10 minutes"]),
    callbacks=st.lists(st.sampled_from(["a.B", "c.d.E"]), max_size=2),
)
def test_what_is_written_reads_back_equal(file, lr, args, clip, p, accumulate, devices, name, root, every, callbacks):
    config = changed(optim__lr=lr, optim__args=args, clip__norm=clip, clip__p=p, batch__accumulate=accumulate)
    config.fabric.devices, config.name, config.data.root = devices, name, root
    config.checkpoint.every, config.callbacks = every, callbacks
    file.write_text(to_yaml(config))
    assert load(file) == config


@pytest.mark.parametrize("name", ["1e3", "123", "1.5", "true", "2024-01-01", "1_000", "0x10", "yes"])
def test_names_that_look_like_something_else_read_back(tmp_path, name):
    config = changed(name=name)
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "written.yaml").name == name
    assert parsed(tmp_path, BASE, f"--name={name}").name == name


def test_every_key_is_written():
    assert yaml.safe_load(to_yaml(changed())) == asdict(changed())


def test_flatten():
    tree = {"a": 1, "b": {"c": {"d": [1]}, "e": {}}, "f": {"window": {0: 8}}, "g": {0: 1}}
    assert flatten(tree) == {"a": 1, "b.c.d": [1], "b.e": {}, "f.window": {0: 8}, "g": {0: 1}}


def test_where_data_lies(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FABRIC_TRAINER_DATA", raising=False)
    assert data_root(changed()) == Path("/home/someone/.cache/fabric_trainer")
    monkeypatch.setenv("FABRIC_TRAINER_DATA", "/scratch")
    assert data_root(changed()) == Path("/scratch")
    assert data_root(changed(data__root="~/here")) == Path("/home/someone/here")


@pytest.mark.parametrize(
    "text, named",
    [
        ("clip: {norm: 1, agc: 0.01}", "clip.norm and clip.agc are both set"),
        ("clip: {agc: 0}", "clip.agc must be above 0"),
        ("clip: {agc_exempt: [head]}", "clip.agc_exempt"),
        ("faults: {spike: 1}", "faults.spike must be above 1"),
        ("faults: {spike: 5, spike_warmup: 0}", "faults.spike_warmup"),
        ("optim: {lookahead: {k: 0}}", "optim.lookahead.k"),
        ("optim: {lookahead: {alpha: 1.5}}", "optim.lookahead.alpha"),
        ("optim: {lookahead: {alfa: 0.5}}", "alfa"),
        ("optim: {sam: {rho: 0}}", "optim.sam.rho"),
        ("optim: {muon: {lr: 0.1}}", "optim.muon is for optim.name: muon_hybrid"),
        ("optim: {name: muon_hybrid, muon: {adjust_lr_fn: spectral}}", "optim.muon.adjust_lr_fn"),
        ("optim: {name: muon_hybrid, muon: {matrices: some}}", "optim.muon.matrices"),
        ("optim: {others: [{name: sgd}]}", "match must name patterns"),
        ("optim: {others: [{match: [head], lrr: 1}]}", "lrr"),
    ],
)
def test_wrong_optimizers_and_limits_are_named_in_one_line(tmp_path, text, named):
    assert named in refusal(parsed, tmp_path, BASE + text)


def test_several_optimizers_in_a_file_and_on_the_command_line(tmp_path):
    text = "optim: {name: muon_hybrid, muon: {lr: 2e-2}, others: [{match: [head.*], name: sgd, args: {momentum: .9}}]}"
    made = parsed(tmp_path, BASE + text, "--optim.lookahead={k: 7}", "--optim.sam.rho=0.1").optim
    assert made.muon.lr == 0.02 and made.others[0].args == {"momentum": 0.9} and made.others[0].lr is None
    assert (made.lookahead.k, made.lookahead.alpha, made.sam.rho) == (7, 0.5, 0.1)
