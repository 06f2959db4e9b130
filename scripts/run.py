"""Runs a command of scripts/experiments or scripts/benchmarks, from any folder.

    [RUN_AS=run.sh] python scripts/run.py PACKAGE.MODULE ARGUMENTS ...

Python puts this folder first on its path, and the packages are in it. What a user can fix ends with one line.
`kill` ends what the command has started, too. RUN_AS is what the user has typed, where that is not MODULE.
"""

import os
import runpy
import sys

from experiments.processes import pass_on_termination
from xmoe_fairseq_compat.errors import one_line

if __name__ == "__main__":
    name = sys.argv.pop(1)
    typed = os.environ.get("RUN_AS", name.rpartition(".")[2])
    pass_on_termination()
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        print(f"{typed}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if text := one_line(error):
            sys.exit(f"{typed}: {text}")
        raise
