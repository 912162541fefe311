"""Runs setup.py where torch is the folder given first; the rest are its arguments."""

import runpy
import subprocess
import sys
from types import SimpleNamespace

folder, *sys.argv[1:] = sys.argv[1:]
real = subprocess.run


def run(command, **how):
    """Answers the question where torch is."""
    if "-I" in command:
        return SimpleNamespace(stdout=folder)
    return real(command, **how)


subprocess.run = run
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
