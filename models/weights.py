"""State dicts out of files that others wrote: pickled, of whatever age, or safetensors; bare or in a checkpoint."""

from __future__ import annotations

import pickle
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_trainer.errors import InputError


def read(path: str | Path, key: str) -> Any:
    """What is in a file, on the host. Only tensors and plain values are ever unpickled.

    key: the argument that gave the path, for the InputError where the file is none of these.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError(
            f"{key}: {path} is a folder; of a sharded checkpoint python -m tools.consolidate makes one file"
        )
    if not file.is_file():
        raise InputError(f"{key}: there is no file {path}")
    return _safetensors(file, key) if file.suffix == ".safetensors" else _pickled(file, key)


def state_in(content: Any, places: Sequence[str], path: str | Path, key: str) -> dict[str, Tensor]:
    """The state dict that ``content`` is, or has under the first of ``places`` that it has. InputError if neither."""
    place = next(
        (name for name in places if isinstance(content, dict) and isinstance(content.get(name), Mapping)), None
    )
    state = content[place] if place else content
    if not is_state(state):
        raise InputError(f"{key}: {path} holds no weights: neither a state dict nor one as {', '.join(places)}")
    return dict(state)


def is_state(value: Any) -> bool:
    """Whether it is a state dict: names and tensors, at least one."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _pickled(file: Path, key: str) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):  # timm saves its arguments as one
            # files older than torch 1.6 are no archives, and can't be mapped
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:  # whose words are an advice to run its code
        raise InputError(f"{key}: {file} is no file of tensors and plain values alone") from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        line = (str(error) or "it is cut short").splitlines()[0]
        raise InputError(f"{key}: {file} is no file of tensors and plain values: {line}") from error


def _safetensors(file: Path, key: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{key}: {file} needs a package: pip install safetensors") from None
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{key}: {file} is no safetensors file: {error}") from error
