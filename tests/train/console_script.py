"""Stands for the `zoo` command in tests of several processes: every process runs this file with the same arguments."""

import json
import sys

import tiny

from zoo.train.run import fit

if __name__ == "__main__":
    assert tiny.V
    settings = json.loads(sys.argv[2])
    sys.exit(fit.run(settings, sys.argv[1]) if settings else fit.resume(sys.argv[1]))
