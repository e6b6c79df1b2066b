"""Search the configuration: ``python -m tools.sweep --name s --config FILE --param 'optim.lr=log(1e-4,1e-1)' …``.

Each trial is a run of train.py in runs/sweeps/NAME/trial-0000 and so on; keys that follow are the same for all.
The same command again continues, a trial that was stopped in the middle too. A trial's value is the best of its
evaluations. Left behind: trials.csv, sweep.png, study.db (Optuna's), and a log beside each trial.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fabric_trainer import command
from fabric_trainer.config import Config, flatten
from fabric_trainer.errors import FAILED, FINISHED, INPUT, SMALLER, TRY_AGAIN, InputError
from fabric_trainer.history import FILE, read_history
from tools.children import TRAIN, Stop, locked
from tools.sweep_plot import state_of, write_csv, write_plot
from tools.sweep_space import Parameter, parse

if TYPE_CHECKING:
    import optuna

TAKEN = "by a sweep, or a trial that a killed one has left running"
OWN = ("name", "run.root")  # keys that the sweep sets
PATIENCE = 5  # trials in a row without any use that end the sweep: the next would be the same


class SweepError(RuntimeError):
    """No trial works."""


def main(argv: Sequence[str] | None = None) -> int:
    options, keys = _parser().parse_known_args(argv)
    try:
        return sweep(options, keys)
    except (InputError, SweepError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT if isinstance(error, InputError) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the sweep: it lies in runs/sweeps/NAME")
    add("--config", required=True, metavar="FILE", help="the runs' YAML file")
    add("--param", required=True, action="append", metavar="KEY=VALUES", dest="parameters",
        help="log(1e-4,1e-1), (0,0.3), (1,8) for whole numbers, [8,16,32]; may come several times")  # fmt: skip
    add("--metric", required=True, help="such as val/loss")
    add("--mode", choices=("min", "max"), default="min", help="which end of it is good (default: min)")
    add("--trials", type=int, required=True, metavar="N", help="how many, those of before included; failed ones aren't")
    add("--pruner", choices=("median",), help="end trials whose evaluation is worse than the median at that point")
    return parser


def sweep(options: argparse.Namespace, keys: list[str]) -> int:
    """Returns the exit code. Raises InputError, SweepError."""
    parameters = [parse(text) for text in options.parameters]
    base = ["--config", options.config, *keys]
    config = check(base, parameters)
    folder = Path(config.run.root) / "sweeps" / options.name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, TAKEN) as lock, Stop() as stop:
        study = _open(folder, options, config, parameters)
        failures = 0
        while _count(study) < options.trials and not stop.signal:
            trial = _next(study, config.seed)
            values = {parameter.key: parameter.suggest(trial) for parameter in parameters}
            arguments = [*base, *(f"--{key}={value}" for key, value in values.items())]
            state = Trial(study, trial, folder, arguments, options, stop, lock).run()
            write_csv(folder / "trials.csv", study, parameters, options.metric)
            failures = failures + 1 if state in ("failed", "refused") else 0
            if failures == PATIENCE:
                log = f"{folder}/trial-{trial.number:04d}.log"
                raise SweepError(f"{PATIENCE} trials in a row failed or were refused: see {log}")
        write_plot(folder / "sweep.png", study, parameters, options.metric)
        _conclude(folder, study, base, options)
    return stop.code


def check(base: list[str], parameters: list[Parameter]) -> Config:
    """The configuration of all trials. Raises InputError where a key, or an end of a range, can't be."""
    from fabric_trainer.cli import make_task

    asked, config = command.parse(base)
    if asked != command.Command(config=asked.config, given=asked.given):
        raise InputError("a sweep takes keys of the configuration alone, and no --resume, --evaluate or the like")
    keys = [parameter.key for parameter in parameters]
    for key in keys:
        if key in OWN:
            raise InputError(f"--param {key}: the sweep itself sets it")
        if key in asked.given or keys.count(key) > 1:
            raise InputError(f"--param {key}: the command sets {key} twice")
    for parameter in parameters:
        for value in parameter.extremes():
            make_task(command.parse([*base, f"--{parameter.key}={value}"])[1])
    return config


# ---- the study ----------------------------------------------------------------------------------------------------


def _open(folder: Path, options: argparse.Namespace, config: Config, parameters: list[Parameter]) -> optuna.Study:
    """A new one, or that of the same sweep. Raises InputError where it is another sweep's."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise InputError(f"a sweep needs the package {error.name}: pip install 'fabric-trainer[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / 'study.db').absolute()}",
        study_name=options.name,
        direction={"min": "minimize", "max": "maximize"}[options.mode],
        pruner=optuna.pruners.MedianPruner() if options.pruner else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    now = {"--metric": options.metric, "--mode": options.mode}
    now |= {f"--param {parameter.key}": parameter.text for parameter in parameters}
    now |= {key: json.dumps(value) for key, value in flatten(asdict(config)).items() if key not in OWN}
    before = study.user_attrs.get("sweep")
    for key in {**(before or now), **now}:
        if before is not None and before.get(key) != now.get(key):
            said = f"{key} was {before.get(key)} and is {now.get(key)}"
            raise InputError(f"{folder} is of another sweep: {said}; give another --name, or delete it")
    study.set_user_attr("sweep", now)
    return study


def _next(study: optuna.Study, seed: int) -> optuna.Trial:
    """The trial that was stopped, else a new one. Its values follow from the seed, its number and the trials before it,
    so that a sweep that was stopped and continued has the trials of one that wasn't."""
    import optuna

    from fabric_trainer.random import mixed

    stopped = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    number = stopped[0].number if stopped else len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=mixed(seed, number) % 2**32)
    return optuna.Trial(study, stopped[0]._trial_id) if stopped else study.ask()


def _count(study: optuna.Study) -> int:
    """The trials that count: all but the failed, and the one under way."""
    import optuna

    return len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]))


class Trial:
    """One run of train.py, and what becomes of it."""

    def __init__(
        self,
        study: optuna.Study,
        trial: optuna.Trial,
        folder: Path,
        arguments: list[str],
        options: argparse.Namespace,
        stop: Stop,
        lock: IO[str],
    ) -> None:
        self.study, self.trial, self.stop, self.options, self.lock = study, trial, stop, options, lock
        self.folder = folder / f"trial-{trial.number:04d}"
        self.log = folder / f"trial-{trial.number:04d}.log"
        own = ["--run.root", str(folder), "--name", self.folder.name, "--resume", "auto"]
        self.command = [sys.executable, str(TRAIN), *arguments, *own]
        self.pruned = False

    def run(self) -> str:
        """finished, pruned, diverged, failed or stopped; the study is told. Raises InputError for a metric that the
        finished run doesn't have."""
        code = SMALLER
        while code == SMALLER and not self.stop.signal:  # out of memory: it goes on with smaller micro-batches
            code = self._launch()
        self._report()
        state, value = self._outcome(code)
        if state == "stopped":  # it stays open, to be continued
            return state
        from optuna.trial import TrialState

        states = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL}
        self.trial.set_user_attr("state", state)
        self.study.tell(self.trial, value, states.get(state, TrialState.PRUNED))
        if state == "failed" and code == FINISHED:
            raise InputError(f"--metric {self.options.metric}: a run has {', '.join(self._metrics())}")
        said = f"{self.options.metric} {value:.6g}" if value is not None else state
        values = " · ".join(f"{key} {_short(value)}" for key, value in self.trial.params.items())
        print(f"trial {self.trial.number}: {said} · {values}", flush=True)
        if state in ("failed", "refused"):
            print(f"  {self._last_line() or signal.Signals(-code).name}", flush=True)
        return state

    def _launch(self) -> int:
        # in a session of its own: a Ctrl-C reaches it once, from us. With our lock: should we be killed, it holds it
        with self.log.open("a") as log, subprocess.Popen(
            self.command, stdout=log, stderr=log, start_new_session=True, pass_fds=[self.lock.fileno()]
        ) as process, self.stop.passed_on_to(process):  # fmt: skip
            while True:
                try:
                    return process.wait(0.5)
                except subprocess.TimeoutExpired:
                    if self.options.pruner and not self.pruned and self._should_prune():
                        self.pruned = True
                        process.send_signal(signal.SIGTERM)

    def _should_prune(self) -> bool:
        return self._report() and self.trial.should_prune()

    def _report(self) -> bool:
        """Tell the study of the evaluations that are new, by their number; returns whether there has been any."""
        known = self.study.trials[self.trial.number].intermediate_values
        values = self._values()
        for number in range(len(known), len(values)):
            self.trial.report(values[number], number)
        return bool(values)

    def _outcome(self, code: int) -> tuple[str, float | None]:
        values = self._values()
        finite = [value for value in values if math.isfinite(value)]
        if code == FINISHED:
            if finite:
                return "finished", min(finite) if self.options.mode == "min" else max(finite)
            return ("diverged" if values else "failed"), None
        if self.pruned and code in (TRY_AGAIN, -signal.SIGTERM):  # the second at the end, past the last update
            return "pruned", None
        if self.stop.signal:
            return "stopped", None
        if code == INPUT:  # its values don't go together: it counts, so that the sampler turns elsewhere
            return "refused", None
        # the library's own lines on a gradient, or a weight, that isn't finite
        diverged = code == FAILED and "finite" in self._last_line() and self._last_line().startswith("error: ")
        return "diverged" if diverged else "failed", None

    def _values(self) -> list[float]:
        """The metric at each evaluation, or of each epoch."""
        return [entry[self.options.metric] for entry in self._entries() if self.options.metric in entry]

    def _metrics(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self._entries() for name in entry if "/" in name))

    def _entries(self) -> list[dict[str, float]]:
        if not (self.folder / FILE).is_file():
            return []
        history = read_history(self.folder)
        return [*history.evaluations, *history.epochs]

    def _last_line(self) -> str:
        return ([line for line in self.log.read_text(errors="replace").splitlines() if line.strip()] or [""])[-1]


def _conclude(folder: Path, study: optuna.Study, base: list[str], options: argparse.Namespace) -> None:
    done = _count(study)
    print(f"{done} of {options.trials} trials" + ("" if done >= options.trials else "; the same command continues"))
    if not any(state_of(trial) == "finished" for trial in study.trials):
        return
    best = study.best_trial
    arguments = [*base, *(f"--{key}={value}" for key, value in best.params.items())]
    print(f"best: trial {best.number}, {options.metric} {best.value:.6g}; {folder}/sweep.png, trials.csv")
    print(f"python train.py {shlex.join(arguments)}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
