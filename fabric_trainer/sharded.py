"""Sharded checkpoints: a folder into which every rank writes what it has, by torch.distributed.checkpoint (DCP).

DCP's files have the tensors, by keys such as ``model.blocks.0.up.weight``; ``plain.pt`` has everything else, and what
tensors there are. No rank ever holds a whole state: each reads its own part, on whatever number of ranks.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from fabric_trainer.errors import CheckpointError, InputError
from fabric_trainer.files import write_atomically

PLAIN, METADATA = "plain.pt", ".metadata"
SHARDS = "shards"  # the key of a loaded state that says where its tensors are
SHAPE, DTYPE = "sharded tensor", "dtype"  # what plain.pt has in a tensor's place


# ---- writing ------------------------------------------------------------------------------------------------------


def write(folder: Path, state: dict[str, Any], group: ProcessGroup | None) -> dict[str, tuple[str, int]]:
    """This rank's part of ``state``, synced; all ranks of the group together (None: one process).

    Returns {file: (sha256, bytes)} of the files that this rank wrote."""
    rank = torch.distributed.get_rank(group) if group else 0
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.save(
            dict(named_tensors(state)),
            storage_writer=_Writer(folder),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    own = list(folder.glob(f"__{rank}_*"))
    if rank == 0:
        file = io.BytesIO()
        torch.save(_replaced(state, lambda value: isinstance(value, Tensor), _description), file)
        write_atomically(folder / PLAIN, file.getvalue())
        own += [folder / PLAIN, folder / METADATA]
    return {path.name: (sha256(path), path.stat().st_size) for path in own}


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # it travels to the other ranks, without what it came from
            raise disk_error(error) or error from None

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the folder is renamed: not its name of now


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk's own error behind ``error``: torch.save, closing its archive, puts one of its own on top."""
    if isinstance(error, CheckpointException):
        found = (disk_error(cause) for cause, _ in error.failures.values())
        return next((cause for cause in found if cause is not None), None)
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


# ---- hashes -------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Of a file, or of all files in a folder."""
    if path.is_dir():
        return sha256_of({file.name: sha256(file) for file in path.iterdir() if file.is_file()})
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(files: dict[str, str]) -> str:
    """Of a folder with these files: the sha256 of the sorted lines ``<name> <sha256>``."""
    return hashlib.sha256("\n".join(sorted(f"{name} {digest}" for name, digest in files.items())).encode()).hexdigest()


# ---- reading ------------------------------------------------------------------------------------------------------


def promised(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state that ``plain.pt`` describes: meta tensors for tensors, and where to read them (:class:`Shards`)."""

    def is_description(value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == {SHAPE, DTYPE}

    def meta(value: dict[str, Any]) -> Tensor:
        return torch.empty(value[SHAPE], dtype=getattr(torch, value[DTYPE]), device="meta")

    return {**_replaced(plain, is_description, meta), SHARDS: str(folder.resolve())}


class Shards:
    """Reads tensors of a state that :func:`promised` made: each rank what it needs, no collective.

    It stands where a function that brings a whole tensor does (``portable.fetch``), and does not bring whole ones.
    """

    def __init__(self, saved: dict[str, Any]) -> None:
        self.folder, self._saved = Path(saved[SHARDS]), saved
        self._keys = {id(tensor): key for key, tensor in named_tensors(saved)}

    def __call__(self, value: Tensor) -> Tensor:
        raise InputError(
            f"{self.folder} is in shards, which this strategy does not read: make it one file first, "
            f"by python -m tools.consolidate {self.folder}"
        )

    def read(self, pairs: Iterable[tuple[Any, Tensor]]) -> None:
        """Into each leaf, in place, what was promised by the meta tensor beside it. Raises CheckpointError where the
        files are damaged, InputError where a leaf is neither a tensor nor a DTensor."""
        wanted = {}
        for leaf, promise in pairs:
            wanted[self._keys[id(promise)]] = leaf.detach() if isinstance(leaf, Tensor) else self(promise)
        try:
            with warnings.catch_warnings(action="ignore"), torch.no_grad():
                dcp.load(
                    wanted,
                    storage_reader=_Reader(self.folder),
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,
                )
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{self.folder} is refused: {error}") from None
        except CheckpointException as error:
            raise self._damaged(next(iter(error.failures.values()))[0]) from None
        except (OSError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: BaseException) -> CheckpointError:
        return CheckpointError(f"{self.folder} is damaged: {(str(error) or 'it is cut short').splitlines()[0]}")


def whole(saved: dict[str, Any], tree: Any) -> Any:
    """``tree``, which is ``saved`` or a part of it, with all its tensors on this process's host."""
    if SHARDS not in saved:
        return tree
    made = _replaced(tree, lambda value: isinstance(value, Tensor), lambda t: torch.empty(t.shape, dtype=t.dtype))
    leaves, promises = ([tensor for _, tensor in named_tensors(each)] for each in (made, tree))
    Shards(saved).read(zip(leaves, promises, strict=True))
    return made


class _Reader(dcp.FileSystemReader):
    """With metadata that was read before DCP asks, because DCP's own way runs whatever a pickle says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with open(folder / METADATA, "rb") as file:
            self.metadata = _MetadataUnpickler(file).load()
        tensors = self.metadata.state_dict_metadata.values()
        if not all(isinstance(value, TensorStorageMetadata) for value in tensors):
            raise pickle.UnpicklingError(f"{METADATA} lists more than tensors")

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self.metadata  # type: ignore[no-any-return]


class _MetadataUnpickler(pickle.Unpickler):
    OURS = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.OURS.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which is no plain value")
        return super().find_class(module, name)


# ---- trees --------------------------------------------------------------------------------------------------------


def named_tensors(tree: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted path, tensor) of every tensor in dicts and lists."""
    if isinstance(tree, Tensor):
        yield key, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for name, value in items:
        yield from named_tensors(value, f"{key}.{name}" if key else str(name))


def _replaced(tree: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """The tree with what ``change`` makes of each leaf."""
    if is_leaf(tree):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _replaced(value, is_leaf, change) for key, value in tree.items()}
    return [_replaced(value, is_leaf, change) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _description(tensor: Tensor) -> dict[str, Any]:
    return {SHAPE: list(tensor.shape), DTYPE: str(tensor.dtype).removeprefix("torch.")}
