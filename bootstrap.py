#!/usr/bin/env python3
"""Set up tidal_vllm in ./.venv and run its demo or its tests.

    python3 bootstrap.py demo    set up, then show sparse decoding at work
    python3 bootstrap.py test    set up, then run the tests
    python3 bootstrap.py setup   set up only

Nothing outside this folder is changed. A second run reuses what the first one
installed. Arguments behind `demo` and `test` are handed on, for instance
`python3 bootstrap.py test tests/unit -k config`.
"""

# NOTE: must run, far enough to say what is missing, on Pythons from 3.7 on.
import hashlib
import os
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")
STAMP = os.path.join(VENV, "tidal_vllm.stamp")
PYTHON_FIRST, PYTHON_END = (3, 10), (3, 14)
NEEDED_GIB = 12
VLLM, TORCH = "vllm==0.32.0", "torch==2.13.0"
# CUDA builds that break `import transformers` beside a CPU build of torch.
CUDA_ONLY = ["torchvision", "torchaudio", "torchcodec"]


def fail(problem, cure):
    sys.stderr.write(f"\ntidal_vllm cannot be set up: {problem}\n  {cure}\n")
    sys.exit(1)


def check_machine():
    """Say what is missing, and how to get it, before anything is done."""
    found = sys.version_info[:2]
    name = "python" + dotted(found)
    if not PYTHON_FIRST <= found < PYTHON_END:
        last = (PYTHON_END[0], PYTHON_END[1] - 1)
        fail(
            f"this is Python {dotted(found)}; allowed: "
            f"{dotted(PYTHON_FIRST)} to {dotted(last)}",
            "Install one, for instance `apt-get install python3.11 python3.11-venv`, "
            "and run this with it: `python3.11 bootstrap.py ...`",
        )
    if not sys.platform.startswith("linux"):
        fail(f"this is {sys.platform}", "vLLM publishes wheels for Linux only.")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as missing:
        fail(
            f"Python's module {missing.name} is missing",
            f"Install it, for instance `apt-get install {name}-venv`",
        )
    free = shutil.disk_usage(HERE).free / 2**30
    if not os.path.exists(STAMP) and free < NEEDED_GIB:
        fail(
            f"{free:.1f} GiB are free in {HERE}; needed: {NEEDED_GIB}",
            "Free some space there, or clone the repository to a larger disk.",
        )


def dotted(numbers):
    return ".".join(map(str, numbers))


def wanted_stamp():
    """A digest of everything that decides what gets installed."""
    digest = hashlib.sha256((VLLM + TORCH + sys.version).encode())
    for name in ("pyproject.toml", "setup.py", "bootstrap.py"):
        with open(os.path.join(HERE, name), "rb") as source:
            digest.update(source.read())
    return digest.hexdigest()


def set_up():
    stamp = wanted_stamp()
    if os.path.exists(STAMP):
        with open(STAMP) as last:
            if last.read() == stamp:
                return
    python = os.path.join(VENV, "bin", "python")
    pip = [python, "-m", "pip"]
    install = [*pip, "install", "--disable-pip-version-check"]
    steps = [
        ("Creating .venv", [sys.executable, "-m", "venv", "--clear", VENV]),
        ("Updating pip", [*install, "--quiet", "--upgrade", "pip"]),
        (f"Installing {TORCH}", [*install, TORCH]),
        (f"Installing {VLLM} (about 2 GB)", [*install, VLLM, TORCH]),
        ("Installing tidal_vllm", [*install, "--editable", HERE + "[test,lint]"]),
    ]
    last = len(steps) + 1
    for number, (title, command) in enumerate(steps, 1):
        run_step(f"[{number}/{last}] {title}", command)
    version = subprocess.check_output([python, "-c", PRINT_TORCH], text=True).strip()
    title = f"[{last}/{last}] torch {version}"
    if "+cpu" in version:
        title += ": removing CUDA builds of " + ", ".join(CUDA_ONLY)
        run_step(title, [*pip, "uninstall", "--yes", "--quiet", *CUDA_ONLY])
    else:
        print(f"{title}: keeping " + ", ".join(CUDA_ONLY), flush=True)
    with open(STAMP, "w") as done:
        done.write(stamp)


PRINT_TORCH = "from importlib.metadata import version; print(version('torch'))"


def run_step(title, command):
    print(title, flush=True)
    start = time.time()
    status = subprocess.call(command)
    if status:
        fail(
            f"{title}: exit status {status}",
            "The lines above say why; run the command again to resume.",
        )
    print(f"    done in {time.time() - start:.0f} s", flush=True)


def main():
    what, rest = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if what not in ("demo", "test", "setup"):
        sys.stdout.write(__doc__)
        sys.exit(0 if what in ("help", "-h", "--help") else 2)
    check_machine()
    set_up()
    bin_dir = os.path.join(VENV, "bin")
    tool = os.path.join(bin_dir, "tidal-vllm")
    if what == "setup":
        sys.exit(subprocess.call([tool, "doctor"]))
    if what == "demo":
        sys.exit(subprocess.call([tool, "demo"] + rest))
    os.chdir(HERE)
    sys.exit(subprocess.call([os.path.join(bin_dir, "pytest")] + rest))


if __name__ == "__main__":
    main()
