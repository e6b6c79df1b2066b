"""What a loop costs: ours, bare Fabric, Accelerate and Lightning's Trainer beside one written by hand, interleaved.

python -m tools.bench.overhead [--pairs 15]

First in one process, then data-parallel in two (torchrun, gloo) beside hand-written DDP. Before it is measured, each
loop must make the updates of the hand-written one. Printed is the median over pairs of (loop / hand-written), with a
95 % bootstrap interval.
"""

from __future__ import annotations

import os

# a CUDA build of torch on a machine without a GPU looks for one at every optimizer step: 0.2 ms in each loop, which
# would make every ratio look better than it is
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import argparse
import gc
import io
import logging
import platform
import subprocess
import sys
import warnings
from contextlib import redirect_stdout

import accelerate
import lightning
import numpy as np
import torch
import torch.distributed as dist

from tools.bench.cases import CASES, Case, Work, world
from tools.bench.loops import LOOPS, Loop, difference

TOLERANCE = 1e-6


def check(case: Case) -> None:
    """A loop that did other work would have another price."""
    for name, loop in LOOPS.items():
        apart = difference(loop, case)
        assert apart <= TOLERANCE, f"{case.name}: {name} is {apart} from the hand-written loop after 5 updates"


def seconds(loop: Loop, case: Case) -> float:
    """Per update."""
    gc.collect()  # what the loop before left is not this one's to clear
    if dist.is_initialized():
        dist.barrier()
    work = Work(case)
    loop(work)
    return work.seconds


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def compare(case: Case, pairs: int) -> None:
    """Measure every loop and print the table; on several ranks, by rank 0's clock."""
    times = {name: np.empty(pairs) for name in LOOPS}
    with redirect_stdout(io.StringIO()):  # our progress lines
        check(case)
        for pair in range(pairs):
            for name in np.roll(list(LOOPS), pair):  # each comes first in turn
                times[name][pair] = seconds(LOOPS[name], case)
    if world()[0] > 0 or pairs == 0:
        return
    plain = times.pop("hand-written")
    written = "hand-written" if world()[1] == 1 else f"hand-written DDP on {world()[1]} ranks"
    print(f"{case.name}: {written} {1e6 * np.median(plain):.1f} us per update, {pairs} pairs")
    for name, measured in times.items():
        median, low, high = interval(measured / plain)
        print(f"  {name:<15} {median:.3f} x  [{low:.3f}, {high:.3f}]  {1e6 * np.median(measured):.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="on two ranks half as many; 0 only checks")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    arguments = parser.parse_args()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{library}.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if dist.is_torchelastic_launched():  # this is one of two
        dist.init_process_group("gloo")
    else:
        print(f"torch {torch.__version__}, lightning {lightning.__version__}, accelerate {accelerate.__version__}")
        print(f"{platform.machine()}, {arguments.threads} thread(s)", flush=True)
    for case in CASES:
        compare(case, arguments.pairs)
    if dist.is_initialized():
        dist.destroy_process_group()
    else:
        on_two_ranks(arguments.pairs // 2, arguments.threads)


def on_two_ranks(pairs: int, threads: int = 1) -> None:
    """This program in two processes. They stay for all of it: every loop uses their process group."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    program = ("-m", "tools.bench.overhead", f"--pairs={pairs}", f"--threads={threads}")
    subprocess.run([*launcher, *program], env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)


if __name__ == "__main__":
    main()
