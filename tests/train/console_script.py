"""Stands for the `zoo` command in tests of several processes: every process runs this file with the same arguments."""

import json
import sys

import tiny

from zoo.train import fit

if __name__ == "__main__":
    assert tiny.V
    sys.exit(fit.run(json.loads(sys.argv[2]), sys.argv[1]))
