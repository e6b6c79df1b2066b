"""Random numbers that belong to samples.

Counter-based: a draw is a pure function of (seed, epoch, sample index, name of the draw), so workers, ranks, splits
of a batch and resumes can't change it. The mixing function is SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
import os
import zlib

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """x modulo 2^64, as the signed 64-bit integer that torch has for it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts in the sign


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


class SampleRandom:
    """Draws for the B samples of a batch; every draw has shape (B, *shape).

    seed and epoch: ints >= 0; index: int64 (B,), the samples' places in their dataset. The same ``name`` gives the
    same numbers again; give every use its own. It moves to a device with its batch.
    """

    def __init__(self, seed: int, epoch: int, index: Tensor) -> None:
        self.seed, self.epoch, self.index = seed, epoch, index

    def uniform(self, name: str, *shape: int) -> Tensor:
        """float32 in [0, 1), multiples of 2^-24."""
        return _shift_right(self._bits(name, shape), 40).to(torch.float32) * 2.0**-24

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, float32, by Box-Muller. Computed in float64 where the device has it: then a last-digit
        difference between vectorised and scalar code doesn't reach the rounded result."""
        wide = torch.float32 if self.index.device.type == "mps" else torch.float64
        bits = self._bits(name, shape)
        radius = (_shift_right(bits, 32).to(wide) + 0.5) * 2.0**-32
        angle = (bits & 0xFFFFFFFF).to(wide) * (2 * math.pi * 2.0**-32)
        return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(angle)).to(torch.float32)

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high); the bias towards small numbers is below (high - low) / 2^63."""
        return low + _shift_right(self._bits(name, shape), 1) % (high - low)

    def _bits(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """64 random bits per element, as int64 (B, *shape)."""
        keys = self.index
        for part in (self.seed, self.epoch, zlib.crc32(name.encode())):
            keys = _mix(keys + _signed(_GOLDEN * (part + 1)))
        counter = torch.arange(1, math.prod(shape) + 1, device=keys.device) * _GOLDEN
        return _mix(keys[:, None] + counter).view(len(keys), *shape)

    def to(self, device: torch.device, non_blocking: bool = False) -> SampleRandom:
        return SampleRandom(self.seed, self.epoch, self.index.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SampleRandom:
        return SampleRandom(self.seed, self.epoch, self.index.pin_memory())

    def __getitem__(self, rows: slice | Tensor) -> SampleRandom:
        """The draws of some of the batch's rows."""
        return SampleRandom(self.seed, self.epoch, self.index[rows])

    def __len__(self) -> int:
        return len(self.index)


def mixed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and its place: one SplitMix64 round each."""
    mask, x = (1 << 64) - 1, 0
    for part in parts:
        x = (x + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x >> 1


def make_deterministic() -> None:
    """For the rest of the process: deterministic algorithms alone, and a RuntimeError of torch's that names the
    operation that has none. Call it before anything runs on a GPU: cuBLAS reads its setting once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def seed_torch(device: torch.device, *parts: int) -> None:
    """Seed torch's generators of the host and of ``device`` from the parts: what dropout draws from.

    The other generators of ``torch.manual_seed`` are left alone: it costs ten times as much, once per update.
    """
    seed = mixed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
