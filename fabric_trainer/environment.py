"""Where, with what and by which command a run was made: environment.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

DIFF_LIMIT = 1_000_000  # bytes of the uncommitted changes that are kept
# by name: a job's environment also has tokens (SLURM_JWT), which belong in no file
SLURM = ("JOB_ID", "JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_PARTITION", "JOB_NODELIST", "NODELIST", "NNODES",
         "NTASKS", "PROCID", "LOCALID", "NODEID", "CPUS_PER_TASK", "RESTART_COUNT")  # fmt: skip
PACKAGES = ("torch", "lightning", "numpy", "fabric_trainer")


def describe(world_size: int, device: torch.device, strategy: str) -> dict[str, Any]:
    """Everything worth knowing about the run's surroundings, as JSON values; what can't be found out is None.

    Keys: command, working_directory, started (ISO 8601, UTC), host, git, versions, hardware, world_size, device,
    strategy, slurm. git is that of the folder of the started script: commit, branch, changed (lines of ``git status
    --porcelain``), diff (against the commit; cut after 1 MB, saying so).
    """
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "working_directory": os.getcwd(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "git": git_state(_source_folder()),
        "versions": versions(),
        "hardware": hardware(),
        "world_size": world_size,
        "device": str(device),
        "strategy": strategy,
        "slurm": {key: os.environ[f"SLURM_{key}"] for key in SLURM if f"SLURM_{key}" in os.environ},
    }


def git_state(folder: Path, limit: int = DIFF_LIMIT) -> dict[str, Any] | None:
    """Commit, branch and uncommitted changes of the checkout that ``folder`` is in; None without one, or git."""
    if _git(folder, "rev-parse", "--git-dir") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")  # None: nothing is committed yet
    diff = _git(folder, "diff", "--no-ext-diff", "HEAD", limit=limit) if commit else None
    status = _git(folder, "status", "--porcelain", limit=limit)
    return {
        "commit": commit.strip() if commit else None,
        "branch": (_git(folder, "branch", "--show-current") or "").strip() or None,
        "changed": status.splitlines() if status is not None else None,
        "diff": diff,
    }


def versions() -> dict[str, str | None]:
    """Python, the packages that matter to a run, and CUDA and cuDNN where torch was built with them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None  # fabric_trainer run from a checkout: git says which
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def hardware() -> dict[str, Any]:
    """This host: CPU model, cores (of the machine, and those this process may use), torch's threads, bytes of
    memory, names of the visible GPUs."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _source_folder() -> Path:
    script = Path(sys.argv[0]) if sys.argv else Path()
    return script.resolve().parent if script.is_file() else Path.cwd()


def _git(folder: Path, *arguments: str, limit: int = DIFF_LIMIT) -> str | None:
    """What git printed, cut after ``limit`` bytes; None where it failed, isn't there or takes over 10 s."""
    command = ["git", "-C", str(folder), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    text = done.stdout[:limit].decode(errors="replace")
    cut = len(done.stdout) - limit
    return f"{text}\n[cut: {cut} more bytes]\n" if cut > 0 else text


def _cpu_model() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def _memory() -> int | None:
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
