"""Weights of the Universal Physics Stack come through every prefix and wrapper bit-equal, or are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from torch import Tensor, nn
from toys import Regression, config

from fabric_trainer import checkpoint
from fabric_trainer.errors import InputError
from fabric_trainer.state import State
from models.physics import weights
from models.physics.operator import LatentOperator
from models.physics.prior import SteadyPrior
from models.physics.residual import DiffusionResidual
from tools.convert_checkpoint import main

UNET = {"hidden_dim": 12, "depths": [1, 1], "group_size": 6, "num_heads": 2, "mlp_ratio": 1.7}
STACK = {"hidden_dim": 12, "depth": 11, "num_heads": 3, "mlp_ratio": 0.6}
APART = {"hidden_dim": 12, "depth": 2, "num_heads": 3, "attention_type": "channel_separated", "group_size": 6}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: LatentOperator(4, "pdet_unet", UNET),
    "golden": lambda: LatentOperator(
        16, "pdet_unet", {"hidden_dim": 96, "depths": [1, 1, 1], "group_size": 12, "num_heads": 6}
    ),
    "stack": lambda: LatentOperator(4, "pdet_stack", STACK),
    "plain_stack": lambda: LatentOperator(12, "pdet_stack", {**STACK, "depth": 1, "qk_norm": False}),
    "apart": lambda: LatentOperator(4, "pdet_stack", APART),
    "conditioned": lambda: LatentOperator(4, "pdet_unet", UNET, sources={"nu": 2, "bc": 1}, source_hidden=7),
    "residual": lambda: DiffusionResidual(4, 9, cond=2),
    "prior": lambda: SteadyPrior(4),
}
PREFIXES = ["", "operator.", "_orig_mod.", "module.", "operator._orig_mod.", "_orig_mod.module."]
WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "flat": lambda state: state,
    "operator": lambda state: {"operator": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 7, "global_step": 90, "hyper_parameters": {"lr": 0.1}},
    "model": lambda state: {"model": state},
}


def drawn(name: str) -> dict[str, Tensor]:
    generator, state = torch.Generator().manual_seed(0), NETWORKS[name]().state_dict()
    return {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}


@pytest.fixture
def state() -> dict[str, Tensor]:
    return drawn("unet")


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(state) == list(other) and all(torch.equal(value, other[name]) for name, value in state.items())


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def converted(source: Path, to: str, *flags: str) -> Path:
    out = source.with_name(f"{len(list(source.parent.iterdir()))}-{to}.pt")
    assert main([str(source), "--to", to, "-o", str(out), *flags]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], source: Path, *flags: str, to: str = "ours") -> str:
    out = source.with_name("refused.pt")
    assert main([str(source), "--to", to, "-o", str(out), *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and not out.exists()
    return told


# ---- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_in_every_wrapper(prefix, wrapper, tmp_path):
    state, path = drawn("plain_stack"), tmp_path / "theirs.pt"
    torch.save(WRAPPERS[wrapper]({prefix + name: value for name, value in state.items()}), path)
    ours = converted(path, "ours")
    assert same(loaded(ours)["model"], state)
    for to, place, before in (("native", None, ""), ("lightning", "state_dict", "operator.")):
        theirs = converted(ours, to)
        written, again = loaded(theirs), weights.read(theirs)
        assert same(written[place] if place else written, {before + name: value for name, value in state.items()})
        assert same(again.state, state)
        if wrapper == "state_dict" and to == "lightning":
            assert (written["epoch"], written["global_step"], written["hyper_parameters"]) == (7, 90, {"lr": 0.1})
            assert (again.epoch, again.step, again.settings) == (7, 90, {"lr": 0.1})
            assert loaded(ours)["counters"]["step"] == 90


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_known_by_its_tensors(name, tmp_path, capsys):
    state = drawn(name)
    torch.save(state, tmp_path / "theirs.pt")
    ours = converted(tmp_path / "theirs.pt", "ours")
    numbers = sum(value.numel() for value in state.values())
    which = name if name in ("residual", "prior") else "operator"
    assert f"{which}, {len(state)} tensors, {numbers:,} numbers" in capsys.readouterr().out
    assert same(loaded(ours)["model"], state) and same(loaded(converted(ours, "native")), state)
    if name == "prior":
        assert "no Lightning module for its steady prior" in refused(capsys, ours, to="lightning")
    else:
        prefix = "diffusion." if which == "residual" else "operator."
        written = loaded(converted(ours, "lightning"))["state_dict"]
        assert same(written, {prefix + key: value for key, value in state.items()})


@settings(max_examples=60, deadline=None)
@given(
    prefix=st.lists(st.sampled_from(["operator.", "_orig_mod.", "module."]), max_size=5).map("".join),
    inside=st.integers(0, 3),
)
def test_any_order_of_prefixes_and_compiled_parts_inside(prefix: str, inside: int) -> None:
    names = ["core.input_proj.weight", "core.down_layers.0.0.0.attn.q_proj.bias", "time_to_latent.weight"]
    value, middle = torch.zeros(1), "_orig_mod." * inside
    saved = {prefix + name.replace(".", f".{middle}", 1): value for name in names}
    assert list(weights.plain(saved)) == names


def test_dtypes_and_what_the_file_shares_stay(state, tmp_path):
    state = {name: value.bfloat16() if value.ndim > 1 else value.double() for name, value in state.items()}
    torch.save(state, tmp_path / "theirs.pt")
    got = loaded(converted(tmp_path / "theirs.pt", "native"))
    assert same(got, state) and all(got[name].dtype == value.dtype for name, value in state.items())


def test_golden_files_of_facts(tmp_path, capsys):
    """The two sizes that were counted in the original."""
    two_tasks = {"hidden_dim": 384, "depth": 12, "num_heads": 8}
    with torch.device("meta"):
        weights.check(LatentOperator(128, "pdet_stack", two_tasks).state_dict())
    for network, numbers in ((NETWORKS["golden"](), "232,152"), (DiffusionResidual(16, 96), "12,592")):
        torch.save(network.state_dict(), tmp_path / "theirs.pt")
        converted(tmp_path / "theirs.pt", "ours")
        assert f"{numbers} numbers" in capsys.readouterr().out


# ---- of several networks, of two averages -------------------------------------------------------------------------


def test_a_diffusion_stage_holds_two_networks(state, tmp_path, capsys):
    residual = drawn("residual")
    both = {f"operator.{name}": value for name, value in state.items()}
    both |= {f"diffusion._orig_mod.{name}": value for name, value in residual.items()}
    torch.save({"state_dict": both, "epoch": 1, "global_step": 2}, tmp_path / "diff.ckpt")
    assert "holds diffusion and operator: --part says which" in refused(capsys, tmp_path / "diff.ckpt")
    assert same(loaded(converted(tmp_path / "diff.ckpt", "native", "--part", "operator")), state)
    assert same(loaded(converted(tmp_path / "diff.ckpt", "native", "--part", "diffusion")), residual)
    torch.save({"operator": state, "diffusion": residual}, tmp_path / "two.pt")
    assert "holds operator and diffusion: --part" in refused(capsys, tmp_path / "two.pt")
    assert same(loaded(converted(tmp_path / "two.pt", "native", "--part", "diffusion")), residual)


def test_a_whole_system_of_ours(state, tmp_path, capsys):
    system = {"encoder.stem.0.bias": torch.ones(2), "dt": torch.ones(())}
    system |= {f"operator.{name}": value for name, value in state.items()}
    average = {name: value + 1 for name, value in system.items() if name != "dt"}
    torch.save({"model": system, "ema": average, "counters": {"step": 4}, "config": {"seed": 3}}, tmp_path / "ours.pt")
    told = refused(capsys, tmp_path / "ours.pt", to="native")
    assert "unexpected: dt, encoder.stem.0.bias" in told
    told = refused(capsys, tmp_path / "ours.pt", "--part", "corrector", to="native")
    assert "no part corrector to take: it has encoder, dt, operator" in told
    assert same(loaded(converted(tmp_path / "ours.pt", "native", "--part", "operator")), state)
    averaged = converted(tmp_path / "ours.pt", "lightning", "--part", "operator", "--weights", "ema")
    written = loaded(averaged)
    assert same(written["state_dict"], {f"operator.{name}": value + 1 for name, value in state.items()})
    assert written["global_step"] == 4 and written["hyper_parameters"] == {"seed": 3}
    assert "has no average" in refused(capsys, averaged, "--weights", "ema")


# ---- strict -------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_in_one_line(state, tmp_path, capsys):
    del state["core.bottleneck.0.ff.net.4.bias"], state["core.down_layers.0.0.0.attn.k_norm.weight"]
    state |= {"core.gain": torch.ones(1), "time_embed.proj.2.weight": torch.ones(4, 5)}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pt")
    assert refused(capsys, tmp_path / "w.pt") == (
        f"error: FILE: {tmp_path / 'w.pt'} is not of this network: "
        "missing: core.bottleneck.0.ff.net.4.bias, core.down_layers.0.0.0.attn.k_norm.weight; "
        "unexpected: core.gain; misshapen: time_embed.proj.2.weight (4, 5) for (4, 4)\n"
    )


SMALL: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: LatentOperator(4, "pdet_unet", UNET),
    "stack": lambda: LatentOperator(4, "pdet_stack", {**STACK, "depth": 2}, sources={"nu": 2}, source_hidden=7),
    "plain_stack": NETWORKS["plain_stack"],
    "apart": lambda: LatentOperator(4, "pdet_stack", {**APART, "depth": 1}),
    "residual": NETWORKS["residual"],
    "prior": NETWORKS["prior"],
}


@pytest.mark.parametrize("name", SMALL)
def test_each_tensor_counts(name):
    """A file that lacks one, or has it in another shape, is refused, and the line names it."""
    state = dict(SMALL[name]().state_dict())
    for key in state:
        with pytest.raises(InputError, match=rf"missing: .*{re.escape(key)}"):
            weights.check({other: kept for other, kept in state.items() if other != key})
    for key, value in state.items():
        named = rf"misshapen: .*{re.escape(key)} "
        if key.endswith((".4.weight", ".4.bias")) and name in ("residual", "prior"):
            named = r"misshapen: .*\.4\.(weight|bias) "  # of two that disagree one is wrong
        with pytest.raises(InputError, match=named):
            weights.check(state | {key: torch.zeros(value.shape[0] + 2, *value.shape[1:])})
        # how much a net is told is known from its first matrix alone
        if value.ndim > 1 and key not in ("network.0.weight", "drift.0.weight") and "embedders" not in key:
            with pytest.raises(InputError, match=named):
                weights.check(state | {key: value[:, 1:]})


def test_two_names_that_are_one(state, tmp_path, capsys):
    first = next(iter(state))
    torch.save(state | {f"_orig_mod.{first}": state[first]}, tmp_path / "w.pt")
    assert f"{first} and _orig_mod.{first} are both {first}" in refused(capsys, tmp_path / "w.pt")
    both = {f"operator.{first}": state[first], f"module.operator.{first}": state[first]}
    torch.save(both, tmp_path / "w.pt")
    for flags in ((), ("--part", "operator")):
        told = refused(capsys, tmp_path / "w.pt", *flags)
        assert f"operator.{first} and module.operator.{first} are both {first}" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"stem.weight": torch.ones(2)}, "no operator, residual or prior: its names begin with stem"),
        ({"core.a": torch.ones(2), "network.a": torch.ones(2)}, "operator and residual at once"),
        ({"core.a": torch.ones(2)}, "missing: output_norm.*, time_to_latent.*, core.output_proj.*"),
        ({"network.a": torch.ones(2)}, "missing: network.4.*"),
        ({"operator": 3}, "holds no weights"),
    ],
)
def test_what_is_none_of_them(content, told, tmp_path, capsys):
    torch.save(content, tmp_path / "w.pt")
    assert told in refused(capsys, tmp_path / "w.pt")


def test_places(state, tmp_path, capsys):
    torch.save(state, tmp_path / "w.pt")
    for out, told in ((tmp_path / "w.pt", "it exists"), (tmp_path / "no" / "w.pt", "there is no folder")):
        assert main([str(tmp_path / "w.pt"), "--to", "ours", "-o", str(out)]) == 2
        assert told in capsys.readouterr().err
    assert "there is no file" in refused(capsys, tmp_path / "nowhere.pt")


def test_load_is_strict_and_of_that_very_network(state, tmp_path):
    network, larger = NETWORKS["unet"](), LatentOperator(4, "pdet_unet", {**UNET, "hidden_dim": 18})
    torch.save({"operator": {f"_orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "w.pt")
    weights.load(network, tmp_path / "w.pt")
    assert same(dict(network.state_dict()), state)
    before = {name: value.clone() for name, value in larger.state_dict().items()}
    with pytest.raises(InputError, match=r"^stages\.operator: .* misshapen: .*\(12,\) for \(18,\)"):
        weights.load(larger, tmp_path / "w.pt", key="stages.operator")
    assert same(dict(larger.state_dict()), before)


# ---- who reads what was written -----------------------------------------------------------------------------------


class Corrector(Regression):
    def network(self) -> nn.Module:
        return DiffusionResidual(4, 9, cond=2)


def test_ours_starts_a_run(fabric: Fabric, tmp_path):
    residual = drawn("residual")
    torch.save({f"_orig_mod.{name}": value for name, value in residual.items()}, tmp_path / "theirs.pt")
    saved = checkpoint.load(converted(tmp_path / "theirs.pt", "ours"))
    state = State(fabric, Corrector(), config())
    state.load_weights(saved | {"ema": None})  # as --init_from does
    assert same(dict(state.module.state_dict()), residual)


def test_lightning_itself_writes_and_reads_them(state, tmp_path):
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, cfg: dict[str, Any]) -> None:
            super().__init__()
            self.save_hyperparameters(cfg)
            operator = LatentOperator(4, "pdet_unet", cfg["pdet"])
            self.operator = torch.compile(operator) if cfg["compile"] else operator

    made = Module({"pdet": UNET, "compile": True, "training": {"dt": 0.1}})
    made.operator._orig_mod.load_state_dict(state)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(made)
    trainer.save_checkpoint(tmp_path / "operator-epoch=01.ckpt")
    assert all(
        name.startswith("operator._orig_mod.") for name in loaded(tmp_path / "operator-epoch=01.ckpt")["state_dict"]
    )
    ours = converted(tmp_path / "operator-epoch=01.ckpt", "ours")
    assert same(loaded(ours)["model"], state)
    written = loaded(converted(ours, "lightning"))
    written["hyper_parameters"]["compile"] = False  # the names have no trace of it
    torch.save(written, tmp_path / "again.ckpt")
    assert same(dict(Module.load_from_checkpoint(tmp_path / "again.ckpt").operator.state_dict()), state)
