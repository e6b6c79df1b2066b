"""Run the stages of a pipeline, each starting where the one before ended:
``python -m tools.pipeline --config FILE [--stage NAME|all] [--name NAME] [--redo NAME] [--operator-ckpt FILE] …``

Each stage is a run of train.py in runs/NAME/STAGE, configured by runs/NAME/STAGE.yaml; runs/NAME/stage_status.json says
how far they are. The same command again skips what is completed and continues what was stopped or killed. Further
keys, such as --fabric.devices 2, are every stage's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from fabric_trainer.errors import FINISHED, INPUT, INTERRUPTED, SMALLER, TRY_AGAIN, InputError
from fabric_trainer.files import remove
from fabric_trainer.history import FILE as HISTORY
from fabric_trainer.history import History, read_history
from fabric_trainer.progress import duration
from tools import children
from tools.children import Stop, end_with, locked
from tools.pipeline_file import MEASURED, STAGES, Stage, examine, read
from tools.pipeline_status import Status, now

TAKEN = "by another pipeline, or a stage that a killed one has left running"
PATIENCE = 60.0  # seconds for such a stage to save and leave
LOOK = 0.2  # seconds between two looks at the stage under way
OPERATOR = STAGES[0]
Popen = subprocess.Popen


def main(argv: Sequence[str] | None = None) -> int:
    options, keys = _parser().parse_known_args(argv)
    try:
        folder, stages = read(options.config, options.name, keys)
        check(options, stages)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, TAKEN, PATIENCE) as lock, Stop() as stop:
            return Pipeline(folder, stages, stop, lock).run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pipeline",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="the pipeline's YAML file: name, common, stages")
    add("--stage", choices=(*STAGES, "all"), default="all", help="one of them alone (default: all)")
    add("--name", help="of the pipeline: it lies in runs/NAME; else the file's name")
    add("--redo", choices=STAGES, help="delete what this stage and those after it have done, and run them anew")
    add("--operator-ckpt", type=Path, metavar="FILE", help="in place of the operator stage: operator.pt, .ckpt or ours")
    add("--commands", action="store_true", help="write the stages' files, print the command of each, and run none")
    return parser


def check(options: argparse.Namespace, stages: list[Stage]) -> None:
    """Raise InputError for options that don't go with the file, and where the stages could not run here."""
    from fabric_trainer.checkpoint import is_checkpoint

    names = [stage.name for stage in stages]
    for key, given in (("stage", options.stage), ("redo", options.redo)):
        if given not in (None, "all", *names):
            raise InputError(f"--{key} {given}: {options.config} has no such stage, only {', '.join(names)}")
    if options.operator_ckpt and not is_checkpoint(options.operator_ckpt):
        raise InputError(f"--operator-ckpt {options.operator_ckpt}: there is no such file")
    if options.operator_ckpt and options.stage == OPERATOR:
        raise InputError(f"--operator-ckpt {options.operator_ckpt} is in place of the stage operator: run another")
    launcher = started_by()
    if launcher and not options.commands:
        example = shlex.join(["torchrun", "--nproc-per-node", "2", *command(stages[0], None)[1:]])
        raise InputError(
            f"a launcher started this process ({launcher}), and every rank would start all stages: run the pipeline "
            f"with python alone, or a stage by itself, such as {example} (--commands writes the files and prints all)"
        )
    if launcher:
        return  # the stages are for somewhere else
    for name, problem in examine(stages).items():
        if options.stage in (name, "all") and not options.commands:
            raise InputError(f"stages.{name}: {problem}")


def started_by() -> str | None:
    """What says that this is one of several ranks, such as "WORLD_SIZE=2"; None where nothing does."""
    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # of salloc: srun has not been called
    for name, alone in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("SLURM_NTASKS", 1)):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > alone and not (name == "SLURM_NTASKS" and shell):
            return f"{name}={value}"
    return None


def command(stage: Stage, start: Path | None) -> list[str]:
    """What runs a stage, from its file: to be started with python, or on several ranks by a launcher."""
    run = ["python", os.path.relpath(children.TRAIN), "--config", str(stage.file)]
    if stage.name == MEASURED:
        return [*run, "--evaluate", str(start), "--split", "test", "--out", str(stage.metrics)]
    return [*run, "--name", stage.name, "--run.root", str(stage.root), "--resume", "auto"]


class Pipeline:
    """The stages of one folder. stop: signals for the stage under way. lock: its process holds it too."""

    def __init__(self, folder: Path, stages: list[Stage], stop: Stop, lock: IO[str]) -> None:
        self.folder, self.stages, self.stop, self.lock = folder, stages, stop, lock
        self.status = Status(folder, STAGES)

    def run(self, options: argparse.Namespace) -> int:
        """Returns the exit code. Raises InputError."""
        if options.redo:
            self.forget_from(options.redo)
        if options.operator_ckpt:
            self.status.forget(OPERATOR)
            self.status.change(OPERATOR, status="completed", checkpoint=str(options.operator_ckpt))
        wanted = [stage for stage in self.stages if options.stage in (stage.name, "all")]
        for stage in wanted:
            self.check_unchanged(stage)
        if options.commands:
            return self.print_commands(wanted)
        code = FINISHED
        for stage in wanted:
            if code == FINISHED:
                code = self.stop.code or self.step(stage)
        print(self.table(), flush=True)
        return code

    def forget_from(self, name: str) -> None:
        """Delete what a stage and those after it have done."""
        for later in STAGES[STAGES.index(name) :]:
            self.status.forget(later)
            for path in (self.folder / later, self.folder / f"{later}.yaml", self.folder / f"{later}.err"):
                if path.exists():
                    remove(path)

    # ---- what a stage starts from -----------------------------------------------------------------------------

    def start_of(self, stage: Stage) -> Path | None:
        """The checkpoint of the last completed stage before it; of the first its own, or None. Raises InputError."""
        for name in reversed(STAGES[: STAGES.index(stage.name)]):
            if self.status[name].status == "completed":
                return Path(self.status[name].checkpoint or "")
        own = stage.config.task.args.get("start")
        if stage is self.stages[0] and (stage.name == OPERATOR or own):
            return Path(own) if own else None
        raise InputError(
            f"stage {stage.name} starts from a finished {OPERATOR}, which is {self.status[OPERATOR].status}: "
            f"--stage {OPERATOR} runs it, or --operator-ckpt FILE brings one"
        )

    def has_begun(self, stage: Stage) -> bool:
        """Whether something would be continued, or is done."""
        from fabric_trainer.checkpoint import read_index

        return self.status[stage.name].status == "completed" or bool(read_index(stage.folder / "checkpoints"))

    def check_unchanged(self, stage: Stage) -> None:
        """Raise InputError for a stage that has begun with another configuration."""
        entry = self.status[stage.name]
        in_its_place = entry.status == "completed" and entry.config_sha256 is None
        if in_its_place or entry.config_sha256 == stage.sha256 or not self.has_begun(stage):
            return
        if changes := ", ".join(stage.changes()):
            raise InputError(f"stage {stage.name} began with other keys: {changes}; {_redo(stage)}")

    def check_start(self, stage: Stage, start: Path | None) -> None:
        """Raise InputError for a stage that has begun from other weights."""
        entry = self.status[stage.name]
        if self.has_begun(stage) and entry.config_sha256 and entry.start_sha256 != sha256_of(start):
            raise InputError(f"stage {stage.name} began from other weights, {entry.start}, not {start}; {_redo(stage)}")

    # ---- a stage ----------------------------------------------------------------------------------------------

    def step(self, stage: Stage) -> int:
        """Run it, or what is left of it; returns the exit code. Raises InputError."""
        entry = self.status[stage.name]
        if entry.status == "completed" and entry.config_sha256 is None:
            print(f"{stage.name}: {entry.checkpoint} is in its place", flush=True)
            return FINISHED
        start = self.start_of(stage)
        self.check_start(stage, start)
        if entry.status == "completed":
            print(f"{stage.name}: completed {entry.completed_at}, skipped", flush=True)
            return FINISHED
        self.status.change(
            stage.name,
            status="in_progress",
            started_at=entry.started_at or now(),
            total_epochs=None if stage.name == MEASURED else stage.config.run.max_epochs,
            error_message=None,
            config_sha256=stage.sha256,
            start=str(start) if start else None,
            start_sha256=sha256_of(start),
        )
        if stage.is_finished(start):
            print(f"{stage.name}: finished before", flush=True)
            return self.conclude(stage, FINISHED, "")
        stage.write(start)
        what = "goes on; it started" if self.has_begun(stage) else "starts"
        print(f"{stage.name}: {what} from {start or 'nothing'}", flush=True)
        print(shlex.join(command(stage, start)), flush=True)
        code, line = SMALLER, ""
        while code == SMALLER and not self.stop.signal:  # out of memory: it goes on with smaller micro-batches
            code, line = self.launch(stage, start)
        return self.conclude(stage, code, line)

    def launch(self, stage: Stage, start: Path | None) -> tuple[int, str]:
        """Its process: the exit code, below 0 for a signal's, and the last line that it wrote to standard error."""
        arguments = [sys.executable, str(children.TRAIN), *command(stage, start)[2:]]
        began, before, said = time.monotonic(), self.status[stage.name].seconds, ""
        # the file is there when nobody reads any more; the session lets a Ctrl-C reach it once, from us; and should we
        # be killed, it holds the lock until it has saved
        with (
            stage.errors.open("ab") as errors,
            stage.errors.open(errors="replace") as reader,
            Popen(
                arguments,
                stderr=errors,
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
                preexec_fn=partial(end_with, os.getpid()),
            ) as process,
            self.stop.passed_on_to(process),
        ):
            reader.seek(errors.tell())
            code = None
            while code is None:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(LOOK)
                heard = reader.read()
                sys.stderr.write(heard)
                sys.stderr.flush()
                said = (said + heard)[-10_000:]
                self.count_epochs(stage, seconds=before + time.monotonic() - began)
        lines = [line for line in said.splitlines() if line.strip()]
        return code, lines[-1] if lines else ""

    def count_epochs(self, stage: Stage, seconds: float) -> None:
        """Where there is one more on disk."""
        entry, epochs = self.status[stage.name], len(history(stage).epochs)
        entry.seconds = seconds
        if epochs != entry.epoch:
            self.status.change(stage.name, epoch=epochs)

    def conclude(self, stage: Stage, code: int, line: str) -> int:
        """Note how it ended; returns the pipeline's exit code."""
        if code == FINISHED:
            checkpoint = self.start_of(stage) if stage.name == MEASURED else stage.checkpoint()
            epochs = len(history(stage).epochs)
            self.status.change(
                stage.name, status="completed", completed_at=now(), checkpoint=str(checkpoint), epoch=epochs
            )
            return self.stop.code
        if code in (TRY_AGAIN, INTERRUPTED, SMALLER) or (code < 0 and self.stop.signal):
            self.status.write()  # saved, or killed before there was anything to save: it stays in progress
            return code if code in (TRY_AGAIN, INTERRUPTED) else self.stop.code
        message = line.removeprefix("error: ") or (signal.Signals(-code).name if code < 0 else f"exit code {code}")
        self.status.change(stage.name, status="failed", error_message=message)
        print(f"error: stage {stage.name} failed: {message} ({stage.errors})", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code

    # ---- what is shown ----------------------------------------------------------------------------------------

    def print_commands(self, wanted: list[Stage]) -> int:
        """A line for each stage that isn't completed, to be run in this order."""
        given = self.status[OPERATOR]
        start = Path(given.checkpoint) if given.checkpoint else None
        for stage in self.stages:
            entry = self.status[stage.name]
            if entry.status == "completed":
                start = Path(entry.checkpoint or "")
                continue
            if stage in wanted:
                stage.write(start)
                print(shlex.join(command(stage, start)))
            start = stage.checkpoint()
        return FINISHED

    def table(self) -> str:
        """Stage, status, time, and the figure that it is judged by."""
        rows = [("stage", "status", "time", "")]
        for stage in self.stages:
            entry = self.status[stage.name]
            rows.append((stage.name, entry.status, duration(entry.seconds), self.figure(stage)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def figure(self, stage: Stage) -> str:
        """Such as "val/nrmse 0.0142", of the best checkpoint; the evaluation's is the same on its split."""
        asked = [each.config.checkpoint for each in (stage, *reversed(self.stages)) if each.config.checkpoint.monitor]
        name, found = (asked[0].monitor or "") if asked else "", {}
        if stage.name != MEASURED and asked:
            found = history(stage).best(name, asked[0].mode) or {}
        elif stage.metrics.is_file():
            found, name = json.loads(stage.metrics.read_text())["metrics"], name.replace("val", "test", 1)
        return f"{name} {float(found[name]):.4g}" if name in found else ""


def history(stage: Stage) -> History:
    """Of its run so far."""
    return read_history(stage.folder) if (stage.folder / HISTORY).is_file() else History()


def sha256_of(checkpoint: Path | None) -> str | None:
    """Of a checkpoint's file, as its run noted it, or read now."""
    if checkpoint is None:
        return None
    from fabric_trainer.checkpoint import read_index
    from fabric_trainer.sharded import sha256

    noted = read_index(checkpoint.parent).get(checkpoint.resolve().name)
    return str(noted["sha256"]) if noted else sha256(checkpoint)


def _redo(stage: Stage) -> str:
    return f"--redo {stage.name} deletes what it and those after it have done, and runs them anew"


if __name__ == "__main__":
    sys.exit(main())
