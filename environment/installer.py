"""Who installs: uv where it is present, else pip."""

import shutil
import subprocess
from dataclasses import dataclass

# Settings of pip's that change nothing about what is installed from where.
HARMLESS = {
    *(
        "cache-dir",
        "config-file",
        "default-timeout",
        "disable-pip-version-check",
        "no-cache-dir",
    ),
    *("no-color", "no-input", "no-python-version-warning", "progress-bar", "quiet"),
    *("require-virtualenv", "resume-retries", "retries", "root-user-action"),
    *("timeout", "verbose", "break-system-packages", "user", "no-warn-script-location"),
}


@dataclass(frozen=True)
class Installer:
    """Makes commands that install into one environment.

    Attributes:
        python: Path of the environment's interpreter.
        uv: Path of uv; None where pip installs.
        why: One line for the user.
        wheels: A folder to install from, and from nowhere else.
    """

    python: str
    uv: str | None
    why: str
    wheels: str | None = None

    @classmethod
    def choose(cls, python: str, wheels: str | None = None) -> "Installer":
        """uv where it is on PATH and pip is not told where to find packages.

        uv reads none of pip's settings, so it could look elsewhere than the user means.
        """
        uv = shutil.which("uv")
        if uv is None:
            return cls(python, None, "pip installs", wheels)
        own = [] if wheels else pip_settings(python)
        if own:
            why = f"pip installs: uv would ignore its settings ({', '.join(own)})"
            return cls(python, None, why, wheels)
        return cls(python, uv, f"uv installs ({uv})", wheels)

    def install(
        self, *requirements: str, bare: bool = False, progress: str = "raw"
    ) -> list[str]:
        """The command that installs requirements.

        Args:
            bare: Whether to install them without what they require, and to build them
                with the tools of the environment.
            progress: pip's `--progress-bar`; pip before 24.1 does not know "raw".
        """
        if self.uv:
            command = [self.uv, "pip", "install", "--python", self.python]
        else:
            command = self.pip("install", "--progress-bar", progress)
        if bare:
            command += ["--no-deps", "--no-build-isolation"]
        return [*command, *self.sources(), *requirements]

    def pip(self, *words: str) -> list[str]:
        """A command of the environment's own pip."""
        quiet = ["--no-input", "--disable-pip-version-check"]
        return [self.python, "-m", "pip", *quiet, *words]

    def sources(self) -> list[str]:
        return ["--no-index", "--find-links", self.wheels] if self.wheels else []


def pip_settings(python: str) -> list[str]:
    """Names of pip's settings that say what is installed from where."""
    command = [python, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = {
        line.partition("=")[0].rpartition(".")[2].strip()
        for line in done.stdout.splitlines()
        if "=" in line
    }
    return sorted(names - HARMLESS)
