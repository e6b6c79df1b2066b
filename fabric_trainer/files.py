"""Writing a file whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` (a str as UTF-8), so that a kill at any moment leaves the old file or the new one.

    The folder must exist. Raises OSError, with the old file untouched and nothing left beside it.
    """
    path = Path(path)
    # no other writer, in this process or another, has this name; open() gives it the permissions that umask says
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path | str) -> None:
    """Make the folder's entries (a rename, a new file) survive a power cut; nothing where that isn't supported."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashingFile:
    """A binary file that knows the sha256 of what went through it, and is on disk when it closes."""

    def __init__(self, path: Path, open_: Callable[..., Any] = open) -> None:
        self._path, self._file = path, open_(path, "wb", buffering=1 << 20)
        self._hash, self.bytes, self.sha256 = hashlib.sha256(), 0, ""

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self.sha256 = self._hash.hexdigest()
        except OSError:
            kind = OSError
            raise
        finally:
            if kind is None:
                self._file.close()
            else:
                _discard(self._file, self._path)


def _discard(file: Any, path: Path) -> None:
    """Close and delete what could not be written; closing tries to flush once more, which may fail once more."""
    with suppress(OSError):  # the error that led here is the one to report
        file.close()
    path.unlink(missing_ok=True)


def hidden(path: Path) -> Path:
    """Where it is while it is written."""
    return path.with_name(f".{path.name}.tmp")


def remove(path: Path) -> None:
    """A file or a folder, if it is there; half a folder never has the name of a whole one."""
    if path.is_dir() and not path.is_symlink():
        gone = path if path.name.startswith(".") else path.with_name(f".{path.name}.gone.tmp")
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)
