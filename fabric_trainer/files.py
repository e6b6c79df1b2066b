"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path


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
