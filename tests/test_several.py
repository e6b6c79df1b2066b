"""Several optimizers as one, and Muon for the hidden matrices: bit-equal to stepping each by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from toys import Points, Regression
from toys import config as configured

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.config import FaultsConfig, MuonConfig, OptimConfig, OtherConfig
from fabric_trainer.describe import describe
from fabric_trainer.errors import InputError
from fabric_trainer.faults import Guard
from fabric_trainer.muon import Muon
from fabric_trainer.optim import build_optimizer
from fabric_trainer.several import Several, kernels


class Small(nn.Module):
    """An embedding, two blocks with matrices, vectors and a convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)) for _ in range(2))
        self.mix = nn.Conv1d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, index):
        x = self.first(self.embed(index))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x + self.mix(x[:, None])[:, 0]))


def network() -> Small:
    torch.manual_seed(0)
    return Small()


def built(net: Small, **keys):
    return build_optimizer(net, OptimConfig(**keys), "cpu", blocks=net.blocks)


def train(net: Small, optimizers: list, updates: int = 4) -> None:
    for update in range(updates):
        index = torch.randint(7, (9,), generator=torch.Generator().manual_seed(update))
        net.zero_grad()
        net(index).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def same(ours: nn.Module, theirs: nn.Module) -> list[str]:
    other = theirs.state_dict()
    return [name for name, value in ours.state_dict().items() if not torch.equal(value, other[name])]


def names(net: nn.Module, optimizer) -> dict[str, set[str]]:
    by_id = {id(parameter): name for name, parameter in net.named_parameters()}
    return {group["name"]: {by_id[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def refusal(**keys) -> str:
    with pytest.raises(InputError) as caught:
        built(network(), **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


HIDDEN = {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 2)}


# ---- muon_hybrid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("args", [{}, {"momentum": 0.8, "nesterov": False, "ns_steps": 3}])
def test_muon_and_adamw_are_two_torch_optimizers_stepped_by_hand(convention, args):
    ours, theirs = network(), network()
    muon = MuonConfig(lr=0.02, weight_decay=0.05, adjust_lr_fn=convention, args=args)
    optimizer = built(ours, name="muon_hybrid", lr=3e-3, weight_decay=0.1, args={"betas": [0.8, 0.9]}, muon=muon)
    named = dict(theirs.named_parameters())
    keys = {"lr": 3e-3, "betas": (0.8, 0.9), "fused": True}
    by_hand = [
        torch.optim.Muon([named[n] for n in named if n in HIDDEN], 0.02, 0.05, adjust_lr_fn=convention, **args),
        torch.optim.AdamW([p for n, p in named.items() if n not in HIDDEN and p.ndim > 1], weight_decay=0.1, **keys),
        torch.optim.AdamW([p for p in named.values() if p.ndim < 2], weight_decay=0.0, **keys),
    ]
    train(ours, [optimizer])
    train(theirs, by_hand)
    assert same(ours, theirs) == []
    assert len(same(ours, network())) == len(list(ours.parameters())), "all have moved"
    assert names(ours, optimizer)["muon"] == HIDDEN


def test_which_matrices():
    def of_muon(matrices) -> set[str]:
        net = network()
        return names(net, built(net, name="muon_hybrid", muon=MuonConfig(matrices=matrices)))["muon"]

    assert of_muon("hidden") == HIDDEN
    assert of_muon("all") == HIDDEN | {"first.weight", "head.weight"}, "neither embeddings nor convolutions"
    assert of_muon(["blocks.1.*.weight", "first.weight"]) == {n for n in HIDDEN if ".1." in n} | {"first.weight"}
    assert "mix.weight has 3 dimensions" in refusal(name="muon_hybrid", muon=MuonConfig(matrices=["mix.weight"]))
    assert "did you mean" in refusal(name="muon_hybrid", muon=MuonConfig(matrices=["block.0"]))
    assert "takes no momentun" in refusal(name="muon_hybrid", muon=MuonConfig(args={"momentun": 0.9}))
    with pytest.raises(InputError, match=r"task's blocks\(\), and it names none: say all"):
        build_optimizer(network(), OptimConfig("muon_hybrid"), "cpu")


def test_tied_and_frozen_matrices_are_not_muons():
    net = network()
    net.head = nn.Linear(6, 7, bias=False)
    net.head.weight = net.embed.weight
    net.blocks[0].requires_grad_(False)
    optimizer = built(net, name="muon_hybrid", muon=MuonConfig(matrices="all"))
    assert names(net, optimizer)["muon"] == {n for n in HIDDEN if ".1." in n} | {"first.weight"}


def test_without_a_rate_of_its_own_muon_has_adamws():
    net = network()
    optimizer = built(net, name="muon_hybrid", lr=0.5, weight_decay=0.25)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {"decay": (0.5, 0.25), "no_decay": (0.5, 0.0), "muon": (0.5, 0.25)}
    (muon,) = [kernel for kernel in kernels(optimizer) if isinstance(kernel, Muon)]
    assert muon.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"


# ---- optim.others ---------------------------------------------------------------------------------------------------

OTHERS = [
    OtherConfig(["head", "*.bias"], "sgd", lr=0.1, weight_decay=0.0, args={"momentum": 0.9}),
    OtherConfig(["norm", "head"], "lamb", lr=0.01),
    OtherConfig(["embed"], "sgd", lr=0.05, weight_decay=0.0),
]


def test_the_first_pattern_that_meets_a_parameter_has_it():
    net = network()
    optimizer = built(net, name="adamw", weight_decay=0.1, others=OTHERS)
    groups = names(net, optimizer)
    biases = {name for name, _ in net.named_parameters() if name.endswith(".bias")}
    assert groups["sgd"] == biases | {"head.weight"}
    assert groups["lamb"] == {"norm.weight"} and groups["sgd2"] == {"embed.weight"}
    assert groups["all"] == HIDDEN | {"first.weight", "mix.weight"}
    assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in net.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_several_are_each_stepped_by_hand():
    import torch_optimizer

    ours, theirs = network(), network()
    optimizer = built(ours, name="adagrad", lr=0.01, others=OTHERS)
    named = dict(theirs.named_parameters())
    own = {
        group: [named[name] for name in named if name in members] for group, members in names(ours, optimizer).items()
    }
    by_hand = [
        torch.optim.Adagrad(own["all"], lr=0.01, fused=True),
        torch.optim.SGD(own["sgd"], lr=0.1, momentum=0.9, fused=True),
        torch_optimizer.Lamb(own["lamb"], lr=0.01),
        torch.optim.SGD(own["sgd2"], lr=0.05, fused=True),
    ]
    train(ours, [optimizer])
    train(theirs, by_hand)
    assert same(ours, theirs) == []
    assert len(optimizer.state) == sum(len(other.state) for other in by_hand)


def test_patterns_that_meet_nothing_name_near_ones():
    assert "optim.others[0].match: haed meets no parameter; did you mean head" in refusal(
        others=[OtherConfig(["haed"], "sgd")]
    )
    twice = [OtherConfig(["head"], "sgd"), OtherConfig(["head.weight"], "adam")]
    assert "optim.others[1].match: every parameter it meets has an optimizer" in refusal(others=twice)
    assert "no momentun" not in refusal(others=[OtherConfig(["head"], "sgdd")])
    assert "needs a closure" in refusal(others=[OtherConfig(["head"], "lbfgs")])


def test_all_parameters_may_go_to_others():
    net = network()
    optimizer = built(net, others=[OtherConfig(["*"], "sgd", lr=0.1)])
    assert not isinstance(optimizer, Several) and names(net, optimizer).keys() == {"sgd"}


# ---- bad gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, on_device", [("adamw", True), ("adamw", False), ("muon_hybrid", False)])
def test_a_bad_gradient_touches_none_of_several(name, on_device):
    """All fused: each kernel gets the flag. Mixed: the norm is read, and none is stepped."""
    ours, theirs = network(), network()
    others = [OtherConfig(["head", "norm"], "sgd", lr=0.1, args={"momentum": 0.9})]
    one, other = (built(net, name=name, lr=0.01, others=others) for net in (ours, theirs))
    guard = Guard(one, ours, FaultsConfig(), on_device=on_device)
    assert guard._kernel_takes_flag() is False, "on a CPU the norm is read"

    def update(net, seed, bad):
        index = torch.randint(7, (9,), generator=torch.Generator().manual_seed(seed))
        net.zero_grad()
        (net(index).square().mean() * (math.nan if bad else 1)).backward()

    for seed, bad in enumerate([True, False, False, True, False]):
        update(ours, seed, bad)
        guard.step(nn.utils.get_total_norm([p.grad for p in ours.parameters()]))
        assert guard.settle().applied != bad
        if not bad:
            update(theirs, seed, bad)
            other.step()
    assert same(ours, theirs) == []


# ---- in the loop ----------------------------------------------------------------------------------------------------


class Blocks(Regression):
    def network(self):
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 2))

    def blocks(self, network):
        return [network[2]]


def settings(**changes):
    keys = {
        "batch.accumulate": 3,
        "optim.name": "muon_hybrid",
        "optim.lr": 0.02,
        "optim.weight_decay": 0.1,
        "optim.muon": MuonConfig(lr=0.1, adjust_lr_fn="original"),
        "optim.others": [OtherConfig(["3.bias"], "sgd", lr=0.3, weight_decay=0.0, args={"momentum": 0.9})],
        "schedule.name": "cosine",
        "clip.norm": 1.0,
        "run.max_epochs": None,
        "run.max_steps": 8,
    }
    return configured(**(keys | changes))


def test_the_loop_is_a_plain_one_with_three_optimizers(fabric):
    state = fit(fabric, Blocks(48), settings())
    task, data = Blocks(48), Points(48, 0)
    torch.manual_seed(42)
    net = task.network()
    named = dict(net.named_parameters())
    adamw = {"lr": 0.02, "fused": True}
    optimizers = [
        torch.optim.AdamW([named["0.weight"], named["3.weight"]], weight_decay=0.1, **adamw),
        torch.optim.AdamW([named["0.bias"], named["2.0.bias"]], weight_decay=0.0, **adamw),
        torch.optim.SGD([named["3.bias"]], lr=0.3, momentum=0.9, fused=True),
        torch.optim.Muon([named["2.0.weight"]], lr=0.1, weight_decay=0.1),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    for step in range(8):
        order = task.plan(data, 42)(step // 4)[step % 4 * 12 : step % 4 * 12 + 12]
        for rows in (order[start : start + 4] for start in (0, 4, 8)):
            ((net(data.x[rows]) - data.y[rows]).square().sum(1).sum() / 12).backward()
        nn.utils.clip_grad_norm_([p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]], 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / 8))
            optimizer.step()
        net.zero_grad()
    assert same(state.module, net) == []


def test_a_resume_of_several_is_bit_equal(fabric, tmp_path):
    whole = fit(fabric, Blocks(48), settings(), tmp_path)
    saved = load(sorted((tmp_path / "checkpoints").glob("step-*.pt"))[0])
    assert saved["counters"]["step"] == 4
    assert {group["name"] for group in saved["optimizer"]["groups"]} == {"decay", "no_decay", "muon", "sgd"}
    resumed = fit(fabric, Blocks(48), settings(), saved=copy.deepcopy(saved))
    assert same(whole.module, resumed.module) == []
    a, b = whole.engine.moments(), resumed.engine.moments()
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[name][key])) for key, v in values.items())


def test_the_summary_names_all_and_rates_are_logged_by_group(fabric):
    state = fit(fabric, Blocks(48), settings(**{"run.max_steps": 1}))
    assert describe(state)["optimizer"].startswith(
        "AdamW + SGD + Muon, groups decay (2), no_decay (2), sgd (1), muon (1)"
    )
    assert state.set_learning_rate().keys() == {"lr/decay", "lr/no_decay", "lr/sgd", "lr/muon"}


def test_muon_in_double_precision():
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    fabric.launch()

    class Wide(Blocks):
        def loss(self, network, batch):
            return super().loss(network, batch | {key: batch[key].double() for key in ("x", "y", "weight")})

    state = fit(fabric, Wide(48), settings())
    assert {p.dtype for p in state.module.parameters()} == {torch.float64}
    assert all(p.isfinite().all() for p in state.module.parameters())
