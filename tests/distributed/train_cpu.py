"""train.py, where fabric.strategy: deepspeed runs on CPUs too."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]

if __name__ == "__main__":
    if any("deepspeed" in argument for argument in sys.argv):
        import deepspeed_cpu

        deepspeed_cpu.allow()
    from fabric_trainer.cli import main

    sys.exit(main(sys.argv[1:]))
