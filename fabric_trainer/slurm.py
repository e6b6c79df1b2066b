"""SLURM: a job whose time runs out asks to be started again."""

from __future__ import annotations

import os
import subprocess

PATIENCE = 60  # seconds for a controller that is slow to answer


def requeue() -> str:
    """Requeue this job; a line that says how it went. A failure costs nothing but the restart."""
    job = job_id()
    if job is None:
        return "no SLURM job to requeue"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    else:
        if done.returncode == 0:
            return f"job {job} is requeued: it will continue this run"
        problem = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return f"scontrol requeue {job} failed ({problem}); the run is saved: --resume auto continues it"


def job_id() -> str | None:
    """As scontrol knows it: a task of an array also has an id of its own, which is not the one to requeue it by."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")
