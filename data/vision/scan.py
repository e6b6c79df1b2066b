"""Corrupt picture files, found before training by decoding each file once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import PIL
from PIL import UnidentifiedImageError

from data.vision.decode import decode
from fabric_trainer.errors import InputError
from fabric_trainer.files import write_atomically

_CHUNK = 64  # files that a thread takes at a time


def corrupt(root: Path, names: Sequence[str], tell: Callable[[str], None] = print) -> dict[str, str]:
    """The files under ``root`` that can't be decoded, and why, in the order of ``names``.

    What was found is kept in ~/.cache/fabric_trainer/scans for as long as paths, sizes and times stay the same: the
    data itself may be read-only. InputError where a file can't be read at all.
    """
    kept = _cache() / f"{_key(root, names)}.json"
    with suppress(OSError, ValueError):  # none yet, or not one that we wrote
        found = json.loads(kept.read_text())
        if isinstance(found, dict):
            return found
    tell(f"decoding {len(names)} pictures of {root} once, to find corrupt ones")
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as threads:  # Pillow decodes without the GIL
        reasons = [reason for chunk in threads.map(lambda chunk: _reasons(root, chunk), chunks) for reason in chunk]
    found = {name: reason for name, reason in zip(names, reasons) if reason}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(found, indent=1))
    except OSError as error:
        tell(f"what was found is not kept for the next run: {error}")
    return found


def _reasons(root: Path, names: Sequence[str]) -> list[str]:
    return [_reason(root / name) for name in names]


def _reason(path: Path) -> str:
    """Why it can't be decoded, or nothing. JPEGs are decoded at an eighth of their size, which reads all bytes."""
    try:
        decode(path, least=1)
    except UnidentifiedImageError:
        return "no picture" if path.stat().st_size else "an empty file"
    except Exception as error:  # a damaged file may raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # nothing wrong with the picture
            raise InputError(f"{path}: can't be read ({error.strerror})") from None
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _cache() -> Path:
    return Path("~/.cache/fabric_trainer/scans").expanduser()


def _key(root: Path, names: Sequence[str]) -> str:
    """Of the files as they are, and of the decoder: another Pillow may read what this one can't."""
    key = hashlib.sha256(f"{root.resolve()}\n{PIL.__version__}\n".encode())
    for name in names:
        try:
            status = (root / name).stat()
        except OSError as error:
            raise InputError(f"{root / name}: can't be read ({error.strerror})") from None
        key.update(f"{name}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return key.hexdigest()
