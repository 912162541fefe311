#!/usr/bin/env python3
"""Set up tidal_vllm in ./.venv and run its demo or its tests.

    python3 bootstrap.py demo          set up, then show sparse decoding at work
    python3 bootstrap.py demo --model smollm2      the same, with a pretrained model
    python3 bootstrap.py test          set up, then run the tests of a few minutes
    python3 bootstrap.py test --all    set up, then run all tests
    python3 bootstrap.py setup         set up and look at what came of it
    python3 bootstrap.py wheels DIR    set up, then fill DIR with all that it takes

Arguments behind `demo` and `test` are handed on, for instance
`python3 bootstrap.py test tests/plan -k config`. Options stand before these words:

    --vllm VERSION    0.32.0 (default), or 0.33.0, in ./.venv-0.33.0
    --wheels DIR      install from that folder alone, without network
    --full            install what only an NVIDIA GPU uses, too

Nothing outside this folder is changed, but for the installer's cache. A second run
reuses what the first one installed, and goes on where it was interrupted.
./.venv/setup.log tells the details.
"""

# NOTE: must run, far enough to say what is missing, on Pythons from 3.7 on: so do not
# import `environment` before the machine was looked at.
import os
import shutil
import signal
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TORCH = {"0.32.0": "2.13.0", "0.33.0": "2.14.0"}  # by the vLLM that requires it
PYTHON_FIRST, PYTHON_END = (3, 11), (3, 14)  # both vLLM's wheels and tidal_vllm
NEEDED_GIB = 12
WORDS = ("demo", "test", "setup", "wheels")
MOST_WORKERS = 8  # of pytest; each may hold an engine
INTERRUPTED, NOTHING_COLLECTED = 2, 5  # pytest's exit statuses


def fail(problem, cure):
    sys.stderr.write(f"\ntidal_vllm cannot be set up: {problem}\n  {cure}\n")
    sys.exit(1)


class Options:
    """What the command line asks for."""

    def __init__(self, arguments):
        self.vllm, self.wheels, self.full = "0.32.0", None, False
        words = list(arguments)
        while words and words[0].startswith("-"):
            name, _, value = words.pop(0).partition("=")
            if name in ("--vllm", "--wheels"):
                if not value and not words:
                    usage(f"{name} needs a value")
                setattr(self, name[2:], value or words.pop(0))
            elif name == "--full" and not value:
                self.full = True
            elif name in ("-h", "--help"):
                usage()
            else:
                usage(f"{name} is unknown; options: --vllm, --wheels, --full")
        self.word, self.rest = (words or ["help"])[0], words[1:]
        self._check()

    def _check(self):
        if self.word == "help":
            usage()
        if self.word not in WORDS:
            usage(f"{self.word} is unknown; allowed: {', '.join(WORDS)}")
        if self.vllm not in TORCH:
            usage(f"--vllm {self.vllm}; allowed: {', '.join(TORCH)}")
        if self.wheels and not os.path.isdir(self.wheels):
            usage(f"--wheels {self.wheels}: there is no such folder")
        for argument in self.rest:
            if argument.partition("=")[0] in ("--vllm", "--wheels", "--full"):
                usage(f"{argument} has to stand before `{self.word}`")
        takes = {"setup": 0, "wheels": 1}.get(self.word, len(self.rest))
        if len(self.rest) != takes:
            usage("`wheels` takes one folder, `setup` nothing")

    @property
    def models(self):
        """Whether the demo has to fetch a model, which takes packages of its own."""
        words = iter(self.rest if self.word == "demo" else ())
        for word in words:
            name, _, value = word.partition("=")
            if name == "--model":
                folder = os.path.join(HERE, value or next(words, ""))
                return not os.path.isdir(folder)
        return False

    @property
    def evaluate(self):
        """Whether lm_eval is needed, which only a test outside the first tier runs."""
        return self.word == "wheels" or self.word == "test" and "--all" in self.rest

    @property
    def folder(self):
        """The folder of the environment."""
        first = next(iter(TORCH))
        return os.path.join(
            HERE, ".venv" if self.vllm == first else ".venv-" + self.vllm
        )


def usage(mistake=None):
    if mistake is None:
        sys.stdout.write(__doc__)
        sys.exit(0)
    sys.stderr.write(f"{__doc__}\n{mistake}\n")
    sys.exit(2)


def check_machine(vllm):
    """Say what is missing, and how to get it, before anything is done."""
    found = sys.version_info[:2]
    name = "python" + dotted(found)
    if not PYTHON_FIRST <= found < PYTHON_END:
        last = (PYTHON_END[0], PYTHON_END[1] - 1)
        fail(
            f"this is Python {dotted(found)}; allowed with vLLM {vllm}: "
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


def check_disk():
    free = shutil.disk_usage(HERE).free / 2**30
    if free < NEEDED_GIB:
        fail(
            f"{free:.1f} GiB are free in {HERE}; needed: {NEEDED_GIB}",
            "Free some space there, or clone the repository to a larger disk.",
        )


def dotted(numbers):
    return ".".join(map(str, numbers))


def test_commands(python, arguments):
    """The pytest commands of `test`, or of `test --all`: in parallel, then alone."""
    pytest = [python, "-m", "pytest"]
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    parallel = ["-n", str(workers), "--dist", "loadfile"]
    if "--all" not in arguments:
        return [[*pytest, "--quick", *parallel, *arguments]]
    arguments, asked = take_marker(a for a in arguments if a != "--all")
    alone, others = "serial", "not serial"
    if asked:
        alone, others = (f"{own} and ({asked})" for own in (alone, others))
    return [
        [*pytest, "-m", others, *parallel, *arguments],
        [*pytest, "-m", alone, *arguments],
    ]


def take_marker(arguments):
    """Split pytest's arguments into those without its `-m`, and what `-m` asks for."""
    others, asked = [], None
    words = iter(arguments)
    for word in words:
        if word == "-m":
            asked = next(words, None)
        elif word.startswith("-m") and not word.startswith("--"):
            asked = word[2:].lstrip("=")
        else:
            others.append(word)
    return others, asked


def run_all(commands):
    """Run all commands, whatever becomes of each.

    Returns:
        The exit status of the first failure, or 0. A command without a test to run is
        a failure only if all commands are without one.
    """
    statuses = [run_one(command) for command in commands]
    failures = [status for status in statuses if status not in (0, NOTHING_COLLECTED)]
    if failures:
        return failures[0]
    return min(statuses)


def run_one(command):
    """Run one command to its end, which a signal to this process brings about."""
    child = subprocess.Popen(command)
    # A terminal's Ctrl-C reaches the child as well, which has to end before we do.
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)
    # pytest cleans up behind SIGINT only.
    terminate = signal.signal(
        signal.SIGTERM, lambda *_: child.send_signal(signal.SIGINT)
    )
    status = child.wait()
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    if status < 0:
        sys.exit(128 - status)
    if status == INTERRUPTED:
        sys.exit(status)
    return status


def main(arguments):
    options = Options(arguments)
    check_machine(options.vllm)
    sys.path.insert(0, HERE)
    from environment.steps import Environment

    # What pip prints is read, and all is installed into the environment.
    os.environ.update(PIP_QUIET="0", PIP_VERBOSE="0", PIP_USER="0")

    environment = Environment(
        HERE,
        options.folder,
        vllm=options.vllm,
        torch=TORCH[options.vllm],
        full=options.full,
        wheels=options.wheels,
        tests=options.word != "demo",
        models=options.models,
        evaluate=options.evaluate,
    )
    if not environment.is_ready():
        if not environment.record.get("done"):
            check_disk()
        environment.set_up()
    python = os.path.join(options.folder, "bin", "python")
    command = [python, "-m", "tidal_vllm.cli"]
    if options.word == "wheels":
        return environment.fill(os.path.abspath(options.rest[0]))
    os.chdir(HERE)
    if options.word == "test":
        sys.exit(run_all(test_commands(python, options.rest)))
    else:
        command += ["doctor"] if options.word == "setup" else ["demo", *options.rest]
        os.execv(python, command)


if __name__ == "__main__":
    main(sys.argv[1:])
