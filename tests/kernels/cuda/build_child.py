"""Runs setup.py where Python's packages are those of one folder, the first argument.

The other arguments are those of setup.py; "requires" prints instead what an isolated
build of a wheel has to install.
"""

import runpy
import sys
import sysconfig

sys.path.insert(0, "build_backend")

import backend  # noqa: E402

folder, *sys.argv[1:] = sys.argv[1:]
library = sysconfig.get_path("purelib"), sysconfig.get_path("platlib")
sys.path[:] = [folder, *(path for path in sys.path if path not in library)]
sysconfig.get_path = lambda name: folder
sys.argv[0] = "setup.py"
if sys.argv[1] == "requires":
    # Setuptools' own commands are among the packages that are hidden.
    backend.build_meta.get_requires_for_build_wheel = lambda settings: ["setuptools'"]
    print(backend.get_requires_for_build_wheel())
else:
    runpy.run_path("setup.py", run_name="__main__")
