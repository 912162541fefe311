"""One process per implementation: a broken kernel takes no other one with it.

An illegal address leaves the process in which it happened without a GPU.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence


def each_alone(
    parser: argparse.ArgumentParser,
    known: Sequence[str],
    measure: Callable[[str, argparse.Namespace], int],
    default: Sequence[str] = (),
) -> int:
    """Measure one implementation here, or several in a process each.

    Args:
        parser: Of a script that this module's caller is; knows `--implementations`.
        known: Names that are allowed.
        measure: Measures one implementation and gives the exit status.
        default: What is measured unless told otherwise; all that are known.

    Returns:
        0, or the status of the last process that failed.
    """
    args = parser.parse_args()
    names = args.implementations or list(default or known)
    for name in names:
        if name not in known:
            parser.error(f"--implementations {name}: allowed are {', '.join(known)}")
    if len(names) == 1:
        return measure(names[0], args)
    status = 0
    for name in names:
        # The last --implementations counts.
        command = [*sys.orig_argv, "--implementations", name]
        status = subprocess.run(command).returncode or status
    return status
