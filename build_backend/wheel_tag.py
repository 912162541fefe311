"""The tag of a wheel with the kernels: `py3-none-manylinux_2_XX_ARCHITECTURE`.

The module has no Python in it, so one wheel serves every Python. It starts wherever the
C and C++ libraries are as new as the symbols that it uses, and torch is.
"""

import re
import subprocess
from pathlib import Path

# The oldest glibc (minor version) of the systems whose libstdc++ has these symbols, as
# auditwheel's manylinux-policy.json has it: last number of GLIBCXX_3.4.N, CXXABI_1.3.N.
GLIBC_OF = {
    "GLIBCXX_3.4": {19: 17, 22: 24, 24: 27, 28: 31, 29: 34, 30: 35, 33: 39},
    "CXXABI_1.3": {7: 17, 10: 24, 11: 27, 12: 31, 13: 34, 15: 39},
}
OLDEST = 17  # manylinux_2_17, which every installer of today knows


def manylinux(library: Path, platform: str) -> str:
    """The platform tag of a module that was linked here, for instance linux_x86_64.

    Raises:
        ValueError: It uses a newer libstdc++ than any that is known here.
    """
    command = ["objdump", "-T", str(library)]
    symbols = subprocess.check_output(command, text=True)
    return f"manylinux_2_{oldest_glibc(symbols)}_{platform.partition('_')[2]}"


def oldest_glibc(symbols: str) -> int:
    """The minor version of the oldest glibc that has all of these versioned symbols."""
    found = [OLDEST, *(int(n) for n in re.findall(r"\(GLIBC_2\.(\d+)", symbols))]
    for library, known in GLIBC_OF.items():
        versions = re.findall(rf"\({re.escape(library)}\.(\d+)\)", symbols)
        newest = max(map(int, versions), default=0)
        fitting = [glibc for version, glibc in known.items() if version >= newest]
        if not fitting:
            raise ValueError(
                f"the module uses {library}.{newest}; allowed: up to "
                f"{library}.{max(known)}, or a newer table in {Path(__file__).name}"
            )
        found.append(min(fitting))
    return max(found)
