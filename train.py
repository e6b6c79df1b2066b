"""Train what a configuration describes: python train.py --config configs/burgers.yaml --optim.lr 3e-4"""

import sys

from fabric_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
