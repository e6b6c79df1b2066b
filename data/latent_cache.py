"""Latents of whole trajectories on disk: encoded once, then read where they are.

A file is named after what it was made from, ``<task>_<split>-<key>.h5``: the key is a hash of the encoder's weights
and configuration, the normalisation, the source files and the precision. Another encoder so has another file, never
the latents of this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.fields import CHUNK, Fields
from data.normalise import Normaliser
from fabric_trainer.errors import InputError
from fabric_trainer.files import sync_folder

VERSION = 1  # of the layout: raise it when the same key would mean other numbers
DTYPES = ("float32", "float16")
STATES = 256  # encoded together


class Latents:
    """A file's latents, mapped into memory: (N, T, tokens, dim), in the file's precision; what is taken is float32.

    It takes single states as a tensor does, ``latents[trajectory, frame]``. Sent to another process, it opens the file
    there: nothing is copied, and no shared memory is used.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with h5py.File(self.path, "r") as file:
            stored = file["latents"]
            self.shape: tuple[int, ...] = stored.shape
            self._where: dict[str, Any] = {"dtype": stored.dtype, "offset": stored.id.get_offset()}
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        return torch.from_numpy(np.array(self.mapped[key], np.float32))

    @property
    def mapped(self) -> NDArray[Any]:
        """The file's own numbers, read only."""
        if self._map is None:
            self._map = np.memmap(self.path, mode="r", shape=self.shape, **self._where)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


def ensure(
    folder: Path,
    fields: Fields,
    normaliser: Normaliser,
    encoder: nn.Module,
    configuration: Mapping[str, Any],
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Latents:
    """The latents of ``fields`` in ``folder``, made where they are missing or damaged; ``say`` hears which and why.

    encoder: normalised fields (B, C, H, W) to (B, tokens, dim); a copy of it runs on ``device``. configuration: of the
    encoder, as JSON has it; what the weights alone don't tell, such as patches and frequencies. Where there are several
    ranks, the first makes the file and the others find it: call this in ``Task.prepare``. Every call reads the file
    once, to verify its checksum. Raises InputError where latents are not finite in this precision, or the folder can't
    be written.
    """
    if dtype not in DTYPES:
        raise InputError(f"latent_cache_dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    key = key_of(fields, normaliser, encoder, configuration, dtype)
    folder = Path(folder)
    path = folder / f"{fields.name}-{key[:16]}.h5"
    fault = check(path, key)
    if fault is None:
        return Latents(path)
    if path.exists():
        say(f"{path}: {fault}; making it anew")
    elif others := sorted(other.name for other in folder.glob(f"{fields.name}-*.h5")):
        say(f"{folder}: {', '.join(others)} is of another encoder, configuration or source; making {path.name}")
    _make_folder(folder)
    _write(path, key, fields, normaliser, encoder, configuration, dtype, device)
    return Latents(path)


def key_of(
    fields: Fields, normaliser: Normaliser, encoder: nn.Module, configuration: Mapping[str, Any], dtype: str
) -> str:
    """The hash that names the file. Source files count by name, size and time of their last change."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in fields.paths]
    source = [stats, [[stored.name, stored.layout] for stored in fields.datasets], fields.shape, fields.steady]
    kind = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    known = [VERSION, dtype, source, kind, dict(configuration)]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for module in (normaliser, encoder):
        for name, value in module.state_dict().items():
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check(path: Path, key: str) -> str | None:
    """What is wrong with a file, in a few words, or None. Reads it whole."""
    if not path.is_file():
        return "missing"
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("key") != key:
                return "stale: made by another encoder, configuration or source"
            sha256 = file.attrs.get("sha256")
        latents = Latents(path).mapped
        digest = hashlib.sha256()
        for rows in _pieces(len(latents), latents[:1].nbytes):
            digest.update(np.ascontiguousarray(latents[rows]))
        if digest.hexdigest() != sha256:
            return "its content does not match its checksum"
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        return f"can't be read ({error})"
    return None


def _make_folder(folder: Path) -> None:
    fault = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fault = error.strerror
    if fault or not os.access(folder, os.W_OK | os.X_OK):
        why = f" ({fault})" if fault else ""
        raise InputError(f"latent_cache_dir: can't write to {folder}{why}; data may be read-only, so name another")


@torch.no_grad()
def _write(
    path: Path,
    key: str,
    fields: Fields,
    normaliser: Normaliser,
    encoder: nn.Module,
    configuration: Mapping[str, Any],
    dtype: str,
    device: torch.device | str,
) -> None:
    encoder, normaliser = deepcopy(encoder).to(device).eval(), deepcopy(normaliser).to(device)  # the caller's stay
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    digest, first, stored = hashlib.sha256(), 0, None
    try:
        with h5py.File(beside, "w") as file:
            for chunk in fields.chunks():
                states = normaliser(torch.from_numpy(chunk).to(device)).flatten(0, 1)
                latents = torch.cat([encoder(some) for some in states.split(STATES)])
                with np.errstate(over="ignore"):  # said below
                    rows = latents.cpu().numpy().astype(np.dtype(dtype).newbyteorder("<"))
                rows = rows.reshape(*chunk.shape[:2], *rows.shape[1:])
                if not np.isfinite(rows).all():
                    raise InputError(f"{fields.name}: its latents are not finite as {dtype}")
                if stored is None:  # in one piece, so that it can be mapped
                    stored = file.create_dataset("latents", (len(fields), *rows.shape[1:]), rows.dtype)
                stored[first : first + len(rows)] = rows
                digest.update(np.ascontiguousarray(rows))
                first += len(rows)
            made_of = json.dumps(dict(configuration), sort_keys=True)
            file.attrs.update({"key": key, "sha256": digest.hexdigest(), "configuration": made_of})
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _pieces(rows: int, row_bytes: int) -> Sequence[slice]:
    size = max(1, CHUNK // row_bytes)
    return [slice(start, start + size) for start in range(0, rows, size)]
