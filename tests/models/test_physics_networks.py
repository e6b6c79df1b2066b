"""The physics networks against plain references, and their parameter names against those that are published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models.physics.conditioner import AdaLNConditioner
from models.physics.operator import LatentOperator
from models.physics.original import OriginalAnyPointDecoder, OriginalGridEncoder
from models.physics.prior import SteadyPrior
from models.physics.residual import DiffusionResidual

STACK = {"hidden_dim": 12, "depth": 3, "num_heads": 3}
UNET = {"hidden_dim": 12, "depths": [1, 2, 1], "group_size": 6, "num_heads": 2}


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its start, in float64."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double().eval()


def named(*stems: str) -> set[str]:
    return {f"{stem}.{part}" for stem in stems for part in ("weight", "bias")}


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def linear(state: Mapping[str, Tensor], stem: str, x: Tensor) -> Tensor:
    return x @ state[f"{stem}.weight"].T + state[f"{stem}.bias"]


def norm(x: Tensor, state: Mapping[str, Tensor] | None = None, stem: str = "", eps: float = 1e-5) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return x * state[f"{stem}.weight"] + state[f"{stem}.bias"] if state else x


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def by_head(heads: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = (each.chunk(heads, -1) for each in (q, k, v))
    return torch.cat([attend(*head) for head in zip(*parts, strict=True)], -1)


# ---- corrector and prior ------------------------------------------------------------------------------------------


def test_residual_has_the_published_names_and_size() -> None:
    residual = DiffusionResidual(16, 96)
    assert set(residual.state_dict()) == named("network.0", "network.2", "network.4")
    assert size(residual) == 12_592
    assert DiffusionResidual(5).network[0].weight.shape == (10, 6)


def test_residual_token_by_token() -> None:
    residual = drawn(DiffusionResidual(5, 7, cond=2, zero_init=False))
    state, z = residual.state_dict(), torch.randn(3, 4, 5).double()
    tau, cond = torch.rand(3).double(), torch.randn(3, 2).double()
    got = residual(z, tau, cond)
    for row in range(3):
        for token in range(4):
            x = linear(state, "network.0", torch.cat((z[row, token], tau[row, None], cond[row])))
            x = linear(state, "network.2", x * torch.sigmoid(x))
            torch.testing.assert_close(got[row, token], linear(state, "network.4", x * torch.sigmoid(x)))
    torch.testing.assert_close(residual(z, 0.5, cond), residual(z, torch.full((3,), 0.5), cond))


def test_prior_token_by_token() -> None:
    prior = drawn(SteadyPrior(5, 7, num_steps=3, cond=1))
    state, z, cond = prior.state_dict(), torch.randn(2, 3, 5).double(), torch.randn(2, 1).double()
    assert set(state) == named("drift.0", "drift.2", "drift.4")
    got = prior(z, cond)
    for row in range(2):
        for token in range(3):
            x = z[row, token]
            for time in (0.0, 0.5, 1.0):
                y = linear(state, "drift.0", torch.cat((x, torch.tensor([time]).double(), cond[row])))
                x = x + linear(state, "drift.4", gelu(linear(state, "drift.2", gelu(y))))
            torch.testing.assert_close(got[row, token], x)
    assert size(SteadyPrior(16)) == 17 * 32 + 32 + 32 * 32 + 32 + 32 * 16 + 16


@pytest.mark.parametrize("make", [DiffusionResidual, SteadyPrior])
def test_correctors_start_by_changing_nothing_and_learn(make: Callable[..., nn.Module]) -> None:
    def out(module: nn.Module, z: Tensor) -> Tensor:
        return module(z) - z if make is SteadyPrior else module(z, 0.3)

    z = torch.randn(2, 3, 4)
    assert not out(make(4), z).any() and out(make(4, zero_init=False), z).any()
    torch.manual_seed(0)
    module = make(4)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):  # the last layer first, what is before it after that
        sgd.zero_grad()
        (out(module, z) - 1).pow(2).sum().backward()
        sgd.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("make", [DiffusionResidual, SteadyPrior])
def test_a_wrong_condition(make: Callable[..., nn.Module]) -> None:
    z, level = torch.randn(2, 3, 4), () if make is SteadyPrior else (0.5,)
    with pytest.raises(ValueError, match="2 numbers per sample, not none"):
        make(4, cond=2)(z, *level)
    with pytest.raises(ValueError, match="0 numbers per sample, not 1 numbers"):
        make(4)(z, *level, torch.ones(2, 1))


def test_a_prior_without_steps() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        SteadyPrior(4, num_steps=0)


# ---- operator -----------------------------------------------------------------------------------------------------


def unet_layer(state: Mapping[str, Tensor], stem: str, x: Tensor, group: int, heads: int) -> Tensor:
    normed, mixed = norm(x, state, f"{stem}.attn_norm"), []
    for part in normed.split(group, -1):
        q = linear(state, f"{stem}.attn.q_proj", rms(part, state[f"{stem}.attn.q_norm.weight"]))
        k = linear(state, f"{stem}.attn.k_proj", rms(part, state[f"{stem}.attn.k_norm.weight"]))
        v = linear(state, f"{stem}.attn.v_proj", part)
        mixed.append(linear(state, f"{stem}.attn.out_proj", by_head(heads, q, k, v)))
    x = x + torch.cat(mixed, -1)
    y = gelu(linear(state, f"{stem}.ff.net.1", norm(x, state, f"{stem}.ff.net.0")))
    return x + linear(state, f"{stem}.ff.net.4", y)


def unet(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """UNET, on an even number of tokens and then an odd one."""

    def layers(stem: str, x: Tensor, count: int) -> Tensor:
        for i in range(count):
            x = unet_layer(state, f"{stem}.{i}", x, 6, 2)
        return x

    x, skips = linear(state, "core.input_proj", x), []
    for level, count in enumerate((1, 2)):
        x = layers(f"core.down_layers.{level}.0", x, count)
        skips.append(x)
        pairs = [x[:, i : i + 2].mean(1) for i in range(0, x.shape[1], 2)]
        x = linear(state, f"core.down_layers.{level}.1", torch.stack(pairs, 1))
    x = layers("core.bottleneck", x, 1)
    for level, count in enumerate((2, 1)):
        skip = skips.pop()
        long, short = skip.shape[1], x.shape[1]
        wide = []
        for i in range(long):
            place = min(max((i + 0.5) * short / long - 0.5, 0), short - 1)
            left, share = int(place), place - int(place)
            wide.append((1 - share) * x[:, left] + share * x[:, min(left + 1, short - 1)])
        x = torch.stack(wide, 1) + linear(state, f"core.up_layers.{level}.0", skip)
        x = layers(f"core.up_layers.{level}.1", x, count)
    return linear(state, "core.output_proj", norm(x, state, "core.final_norm"))


def stack(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """STACK."""
    x = linear(state, "core.input_proj", x)
    for i in range(3):
        stem = f"core.layers.{i}"
        q, k, v = linear(state, f"{stem}.attn.qkv", norm(x, state, f"{stem}.norm1")).chunk(3, -1)
        q, k = (
            torch.cat([rms(head, state[f"{stem}.attn.{name}_norm.weight"]) for head in each.chunk(3, -1)], -1)
            for name, each in (("q", q), ("k", k))
        )
        x = x + linear(state, f"{stem}.attn.proj", by_head(3, q, k, v))
        y = gelu(linear(state, f"{stem}.mlp.0", norm(x, state, f"{stem}.norm2")))
        x = x + linear(state, f"{stem}.mlp.3", y)
    return linear(state, "core.output_proj", norm(x, state, "core.output_norm"))


@pytest.mark.parametrize(("architecture", "core", "plain"), [("pdet_unet", UNET, unet), ("pdet_stack", STACK, stack)])
@pytest.mark.parametrize("sources", [None, {"nu": 2, "bc": 1}])
def test_operator_is_the_plain_formula(architecture: str, core: Any, plain: Any, sources: Any) -> None:
    operator = drawn(LatentOperator(4, architecture, core, sources=sources, source_hidden=5))
    state, z, dt = operator.state_dict(), torch.randn(2, 6, 4).double(), torch.tensor([0.1, 0.3]).double()
    cond = {"bc": torch.randn(2, 1).double(), "nu": torch.randn(2, 2).double(), "unheard": torch.ones(2, 9)}
    time = linear(state, "time_embed.proj.0", dt[:, None])
    time = linear(state, "time_embed.proj.2", time * torch.sigmoid(time))
    x = z + linear(state, "time_to_latent", time)[:, None]
    if sources:
        told = [
            linear(state, f"{stem}.2", gelu(linear(state, f"{stem}.0", cond[stem.split(".")[-1]])))
            for stem in ("conditioner.embedders.nu", "conditioner.embedders.bc")
        ]
        scale, shift, gate = (told[0] + told[1])[:, None].split(4, -1)
        x = torch.sigmoid(gate + 2) * (norm(x) * (1 + scale) + shift)
    expected = z + norm(plain(state, x), state, "output_norm")
    torch.testing.assert_close(operator(z, dt, cond if sources else None), expected)


def test_conditioner_names_start_and_what_it_needs() -> None:
    operator = LatentOperator(4, "pdet_stack", STACK, sources={"param_nu": 1, "dt": 3}, source_hidden=8)
    stems = [f"conditioner.embedders.{name}.{i}" for name in ("param_nu", "dt") for i in (0, 2)]
    assert {name for name in operator.state_dict() if name.startswith("conditioner")} == named(*stems)
    conditioner, z = AdaLNConditioner(4, {"nu": 1}, 8), torch.randn(2, 3, 4)
    at_first = torch.sigmoid(torch.tensor(2.0)) * norm(z)
    torch.testing.assert_close(conditioner(z, {"nu": torch.rand(2, 1)}), at_first)
    with pytest.raises(ValueError, match=r"lacks dt: this operator is told param_nu, dt"):
        operator(z, 0.1, {"param_nu": torch.ones(2, 1)})
    with pytest.raises(ValueError, match="lacks param_nu, dt"):
        operator(z, 0.1)
    with pytest.raises(ValueError, match="sources"):
        AdaLNConditioner(4, {})


def test_an_operator_without_conditions_is_what_it_was() -> None:
    torch.manual_seed(3)
    plain = LatentOperator(4, "pdet_unet", UNET)
    after = torch.rand(1)
    torch.manual_seed(3)
    told = LatentOperator(4, "pdet_unet", UNET, sources={"nu": 1})
    assert all(torch.equal(told.state_dict()[name], value) for name, value in plain.state_dict().items())
    torch.manual_seed(3)
    LatentOperator(4, "pdet_unet", UNET, sources=None)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("kind", ["standard", "channel_separated"])
def test_recomputed_blocks_are_bit_equal_in_what_they_drop_too(kind: str) -> None:
    core = {**STACK, "attention_type": kind, "group_size": 6, "dropout": 0.2, "drop_path": 0.5}
    plain = LatentOperator(4, "pdet_stack", core)
    again = LatentOperator(4, "pdet_stack", {**core, "use_activation_checkpoint": True})
    nn.init.ones_(plain.output_norm.weight)
    again.load_state_dict(plain.state_dict())
    z, out = torch.randn(8, 5, 4), []
    for operator in (plain, again):
        torch.manual_seed(1)
        out.append(operator(z, 0.1))
        out[-1].pow(3).sum().backward()
    assert torch.equal(*out) and not torch.equal(out[0], plain.eval()(z, 0.1))
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad)


def test_dropped_paths_grow_with_depth_and_keep_the_mean() -> None:
    core = LatentOperator(4, "pdet_stack", {**STACK, "drop_path": 0.4}).core
    assert [layer.drop_path for layer in core.layers] == [0.0, 0.2, 0.4]
    torch.manual_seed(0)
    dropped = core.layers[2].train()._drop(torch.ones(20_000, 2, 3))
    rows = dropped.flatten(1)
    assert ((rows == 0) | (rows == rows.max())).all() and rows.max().item() == pytest.approx(1 / 0.6)
    assert (rows[:, :1] == rows).all()  # a sample's branch as a whole
    assert dropped.mean().item() == pytest.approx(1, abs=4 * math.sqrt(0.4 / 0.6 / 20_000))


def test_dropout_reaches_attention_too() -> None:
    attention = LatentOperator(4, "pdet_stack", {**STACK, "dropout": 0.5}).core.layers[0].attn
    x = torch.randn(4, 50, 12)
    plain, zeros = attention.eval()(x), (attention.train()(x) == 0).double().mean().item()
    assert not (plain == 0).any() and zeros == pytest.approx(0.5, abs=0.06)


# ---- the original's encoder and decoder ---------------------------------------------------------------------------


def encoded(encoder: OriginalGridEncoder, fields: dict[str, Tensor], tokens: int, patch: int) -> Tensor:
    """Point by point."""
    state = encoder.state_dict()
    height, width = next(iter(fields.values())).shape[2:]
    rows, columns = height // patch, width // patch
    batch = next(iter(fields.values())).shape[0]
    parts = []
    for name, values in fields.items():
        patches = torch.empty(batch, values.shape[1] * patch * patch, rows, columns).double()
        for c in range(values.shape[1]):
            for i in range(patch):
                for j in range(patch):
                    patches[:, (c * patch + i) * patch + j] = values[:, c, i::patch, j::patch]
        first, last = (f"per_field_stems.{name}.{i}" for i in (0, 2))
        hidden = state[f"{first}.bias"][:, None, None].expand(batch, -1, rows, columns).clone()
        padded = F.pad(patches, (1, 1, 1, 1))
        for i in range(3):
            for j in range(3):
                window = padded[:, :, i : i + rows, j : j + columns]
                hidden += torch.einsum("bchw,oc->bohw", window, state[f"{first}.weight"][:, :, i, j])
        stem = torch.einsum("bchw,oc->bohw", gelu(hidden), state[f"{last}.weight"][:, :, 0, 0])
        parts.append(patches + stem + state[f"{last}.bias"][:, None, None])
    out = []
    for row in range(rows):
        for column in range(columns):
            x = sum(column * patch + i for i in range(patch)) / patch / max(width - 1, 1)
            y = sum(row * patch + i for i in range(patch)) / patch / max(height - 1, 1)
            angles = [2 * math.pi * f * at for at in (x, y) for f in encoder.frequencies]
            position = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
            token = torch.cat([part[:, :, row, column] for part in parts], 1)
            out.append(linear(state, "to_latent", torch.cat((token, position.expand(batch, -1)), 1)))
    n = len(out)
    bins = [range(i * n // tokens, -(-(i + 1) * n // tokens)) for i in range(tokens)]
    return torch.stack([sum(out[i] for i in each) / len(each) for each in bins], 1)


@settings(max_examples=6, deadline=None)
@given(grid=st.sampled_from([(1, 12, 1), (4, 6, 1), (4, 6, 2), (8, 4, 4)]), tokens=st.integers(1, 9))
def test_original_encoder_point_by_point(grid: tuple[int, int, int], tokens: int) -> None:
    height, width, patch = grid
    encoder = drawn(OriginalGridEncoder(tokens, 5, {"u": 1, "v": 2}, patch=patch, stem=3))
    fields = {"u": torch.randn(2, 1, height, width).double(), "v": torch.randn(2, 2, height, width).double()}
    torch.testing.assert_close(encoder(fields), encoded(encoder, fields, tokens, patch))  # type: ignore[arg-type]


def test_original_encoder_of_the_golden_run() -> None:
    encoder = OriginalGridEncoder(32, 16, {"u": 1}, patch=1)
    state = encoder.state_dict()
    assert set(state) == named("per_field_stems.u.0", "per_field_stems.u.2", "to_latent")
    assert state["per_field_stems.u.0.weight"].shape == (32, 1, 3, 3)
    assert state["to_latent.weight"].shape == (16, 9)  # u and eight numbers of the place
    u = torch.randn(2, 1, 1, 1024)
    still = encoder({"u": torch.zeros_like(u)})
    means = u.view(2, 32, 32).mean(2, keepdim=True) * encoder.to_latent.weight[:, 0]  # bin averages are all there is
    torch.testing.assert_close(encoder({"u": u}) - still, means, atol=1e-5, rtol=1e-4)


def test_original_encoder_without_a_linear_map_is_the_patches_alone() -> None:
    encoder, u = OriginalGridEncoder(6, 4, {"u": 1}, patch=2, frequencies=()), torch.randn(2, 1, 4, 6)
    assert not any(name.startswith("to_latent") for name in encoder.state_dict())
    assert torch.equal(encoder({"u": u}), F.pixel_unshuffle(u, 2).flatten(2).mT)
    with pytest.raises(ValueError, match="1 x 12 points has no whole patches of 2 x 2"):
        encoder({"u": torch.randn(1, 1, 1, 12)})


def test_original_decoder_query_by_query() -> None:
    decoder = drawn(OriginalAnyPointDecoder(5, {"rho": 1, "e": 2}, 8, 2, 2, 7, (1, 2), log_clamp=10))
    state, points, z = decoder.state_dict(), torch.rand(2, 3, 2).double(), torch.randn(2, 4, 5).double()
    got = decoder(points, z)
    for row in range(2):
        tokens = linear(state, "latent_proj", z[row])
        for at in range(3):
            x, y = points[row, at].tolist()
            angles = [2 * math.pi * f * place for f in (1, 2) for place in (x, y)]
            marks = torch.tensor([x, y, *map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
            query = linear(state, "query_embed", marks)[None]
            for i in range(2):
                stem = f"layers.{i}"
                weights, biases = (state[f"{stem}.0.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
                q, k, v = (s @ w.T + b for s, w, b in zip((query, tokens, tokens), weights, biases, strict=True))
                attended = linear(state, f"{stem}.0.out_proj", by_head(2, q, k, v))
                query = norm(query + attended, state, f"{stem}.1")
                y_ = linear(state, f"{stem}.2.2", gelu(linear(state, f"{stem}.2.0", query)))
                query = norm(query + y_, state, f"{stem}.3")
            for name, values in got.items():
                value = linear(state, f"heads.{name}.2", gelu(linear(state, f"heads.{name}.0", query)))[0]
                expected = [math.copysign(10 * math.log(1 + abs(v) / 10), v) for v in value.tolist()]
                assert values[row, at].tolist() == pytest.approx(expected, rel=1e-9)


def test_original_decoder_of_the_golden_run() -> None:
    decoder = OriginalAnyPointDecoder(16, {"rho": 1, "e": 1}, 96, layers=3, mlp=128, frequencies=(1, 2, 4, 8))
    expected = named("query_embed", "latent_proj")
    for i in range(3):
        expected |= named(f"layers.{i}.0.out_proj", *(f"layers.{i}.{part}" for part in ("1", "2.0", "2.2", "3")))
        expected |= {f"layers.{i}.0.in_proj_weight", f"layers.{i}.0.in_proj_bias"}
    expected |= named(*(f"heads.{name}.{i}" for name in ("rho", "e") for i in (0, 2)))
    assert set(decoder.state_dict()) == expected
    assert decoder.query_embed.weight.shape == (96, 18)


def test_log_clamp_leaves_small_values_and_damps_large_ones() -> None:
    decoder = OriginalAnyPointDecoder(4, {"u": 1}, log_clamp=10.0)
    small, large = torch.tensor([1e-3, -1e-3]), torch.tensor([1e4, -1e4])
    torch.testing.assert_close(decoder._clamp(small), small, rtol=1e-4, atol=0)
    torch.testing.assert_close(decoder._clamp(large), large.sign() * 10 * math.log(1001))
    with pytest.raises(ValueError, match="log_clamp"):
        OriginalAnyPointDecoder(4, {"u": 1}, log_clamp=0.0)


# ---- all of them --------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "unet": (lambda: LatentOperator(4, "pdet_unet", UNET), lambda net, z: net(z, 0.1)),
    "stack": (lambda: LatentOperator(4, "pdet_stack", STACK), lambda net, z: net(z, 0.1)),
    "conditioned": (
        lambda: LatentOperator(4, "pdet_stack", STACK, sources={"nu": 1}),
        lambda net, z: net(z, 0.1, {"nu": z[:, 0, :1]}),
    ),
    "residual": (lambda: DiffusionResidual(4, cond=1), lambda net, z: net(z, z[:, 0, 0], z[:, 0, :1])),
    "prior": (lambda: SteadyPrior(4), lambda net, z: net(z)),
    "encoder": (lambda: OriginalGridEncoder(3, 5, {"u": 1}, patch=2), lambda net, z: net({"u": z[:, None]})),
    "decoder": (
        lambda: OriginalAnyPointDecoder(4, {"u": 1}, log_clamp=10.0),
        lambda net, z: net(z[..., :2], z)["u"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bf16_is_near_and_gradients_reach_everything(name: str) -> None:
    make, call = CALLS[name]
    module, z = drawn(make()).float(), torch.randn(3, 6, 4)
    expected = call(module, z)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(module, z)
    assert ((got - expected).norm() / expected.norm()).item() < 0.05
    expected.pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_differences(name: str) -> None:
    make, call = CALLS[name]
    module = drawn(make())
    z = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: call(module, z), (z,), fast_mode=True)
