"""The programs in README and docs run as a user would run them: outside the checkout, from a built wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, and nothing else of ours."""
    wheels, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")  # a copy: building leaves files beside what it builds
    shutil.copytree(REPOSITORY / "fabric_trainer", source / "fabric_trainer")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *wheel], check=True)
    (built,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(target), str(built)], check=True)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"fabric_trainer"}
    return target


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), flags=re.DOTALL)


def run(installed: Path, folder: Path, program: str, *arguments: str) -> str:
    (folder / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "2"}
    check = "import fabric_trainer, sys; assert fabric_trainer.__file__.startswith(sys.argv[1])"
    subprocess.run([sys.executable, "-c", check, str(installed)], cwd=folder, env=environment, check=True)
    command = [sys.executable, "program.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_of_the_readme(installed, tmp_path):
    (program,) = programs("README.md")
    assert (
        len([line for line in program.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 20
    )
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", run(installed, tmp_path, program))]
    assert len(losses) >= 3 and losses[-1] < 0.05 * losses[0]


def test_the_character_gpt_learns(installed, tmp_path):
    """A text with one certain next character after each but the first letter of a word: the loss must fall far below
    the 2.2 nats of guessing letters by their frequency."""
    (program,) = programs("docs/own_task.md")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 700)
    out = run(installed, tmp_path, program, "text.txt", "60")
    assert float(re.findall(r"^val/loss ([\d.]+)$", out, flags=re.MULTILINE)[-1]) < 1.5


@pytest.mark.slow
def test_the_character_gpt_on_a_real_text(installed, tmp_path, test_data):
    (program,) = programs("docs/own_task.md")
    out = run(installed, tmp_path, program, str(test_data / "data" / "text" / "tinyshakespeare.txt"), "400")
    loss = float(re.findall(r"^val/loss ([\d.]+)$", out, flags=re.MULTILINE)[-1])
    print(f"tinyshakespeare after 400 updates: val/loss {loss}")
    assert loss < 2.5  # a bigram table reaches about 2.5 nats


def test_every_test_that_the_promises_name_exists():
    page = (REPOSITORY / "docs" / "physics_promises.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 30 and page.count("::") == len(named)
    for file, test in named:
        assert f"\ndef {test}(" in (REPOSITORY / "tests" / file).read_text(), f"{file} has no {test}"
