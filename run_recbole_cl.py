"""Trains a model through a stream of stages: ``python run_recbole_cl.py --model=SASRec --strategy=FineTune``.

The same as ``recbole-cl run`` with the same arguments; without any: SASRec, ml-100k, FineTune.
"""

import sys

from recbole_cl.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
