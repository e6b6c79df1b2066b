"""Another program's command line or configuration file as our configuration.

    python -m tools.translate vision [-o FILE] -- FLAGS
    python -m tools.translate ups FILE [--stage NAME] [--devices N] [--frames N] [-o FILE]

vision: FLAGS are those of the scripts train_lightning.py and its W&B twin, or the whole command. ups: FILE is a
configuration file of the Universal Physics Stack; it becomes a pipeline's, or with --stage that of one stage.

The configuration goes to FILE or to standard output, as YAML; to standard error go the command that runs it, and a
line for what could not be carried over, means something else here, or had to be assumed; of ups, for every key. An
unknown flag or key is an error.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fabric_trainer.command import from_checkpoint
from fabric_trainer.errors import FAILED, FINISHED, INPUT, InputError

STAGES = ("operator", "diff_residual", "consistency_distill", "steady_prior", "evaluation")


class Written(NamedTuple):
    """config: as YAML has it. source: what it was made of. command: that runs FILE, which follows it, and flags.
    notes: the lines about it."""

    config: dict[str, Any]
    source: str
    command: list[str]
    flags: list[str]
    notes: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, misplaced = _parser().parse_known_args(words[:end])
    try:
        if options.system == "vision" and (misplaced or end == len(words)):
            raise InputError("the flags to translate come after --, as in vision -- --epochs 10")
        if options.system == "ups" and (misplaced or end < len(words)):
            raise InputError(f"ups takes a file and no {(misplaced or words[end:])[0]}")
        show(options, words[end + 1 :])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT if isinstance(error, InputError) else FAILED
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.translate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    systems = parser.add_subparsers(dest="system", required=True)
    vision = systems.add_parser("vision", usage="%(prog)s [-o FILE] -- FLAGS", allow_abbrev=False)
    ups = systems.add_parser("ups", allow_abbrev=False)
    ups.add_argument("file", type=Path, metavar="FILE", help="a configuration file of the Universal Physics Stack")
    ups.add_argument("--stage", choices=STAGES, help="one stage, for train.py; else all, for tools/pipeline")
    ups.add_argument("--devices", type=int, metavar="N", help="how many; else training.num_gpus")
    ups.add_argument(
        "--frames", type=int, metavar="N", default=201, help="of a trajectory, where the files aren't there"
    )
    for system in (vision, ups):
        system.add_argument("-o", dest="out", type=Path, metavar="FILE", help="where to; it must not be there yet")
    return parser


def show(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Translate and write. Raises InputError; OSError for a full disk."""
    out: Path | None = options.out
    if out and out.exists():
        raise InputError(f"-o {out} exists: delete it first, or give another")
    if out and not out.parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {out.parent}")
    written = _vision(words) if options.system == "vision" else _ups(options)
    text = f"# {written.source}\n{to_yaml(written.config)}"
    if out:
        out.write_text(text)
    else:
        print(text, end="")
    name = f"{options.system}.yaml"
    command = shlex.join([*written.command, str(out or name), *written.flags])
    print(command if out else f"saved as {name}: {command}", *written.notes, sep="\n", file=sys.stderr)


TRAIN = ["python", "train.py", "--config"]


def _vision(words: Sequence[str]) -> Written:
    config, flags, notes = importlib.import_module("tools.translate_vision").translate(words)
    from_checkpoint(config)  # as train.py will read it
    return Written(config, shlex.join(words), TRAIN, flags, notes)


def _ups(options: argparse.Namespace) -> Written:
    ups = importlib.import_module("tools.translate_ups")
    made = ups.translate(options.file, options.stage, options.devices, options.frames)
    for config in ups.configurations(made.config):
        from_checkpoint(config)
    used = [f"  {line.key}: {line.text}" for line in made.report if line.used]
    rest = [f"  {line.key}: {line.text}" for line in made.report if not line.used]
    notes = ["translated:", *used, "without effect:", *rest]
    command = TRAIN if options.stage else ["python", "-m", "tools.pipeline", "--stage", "all", "--config"]
    return Written(made.config, str(options.file), command, made.flags, notes)


def to_yaml(config: dict[str, Any]) -> str:
    return yaml.dump(config, Dumper=_Plain, sort_keys=False, width=120, default_flow_style=None, allow_unicode=True)


class _Plain(yaml.SafeDumper):
    """Without anchors: the same list twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


if __name__ == "__main__":
    sys.exit(main())
