"""Which vLLM this package was written against; one place says it.

A release outside the range is refused. To support another one: extend the range, name
it in `TESTED`, and let `.ci/run` install it and run the tests marked `compat`.
"""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_VLLM = ">=0.32,<0.34"
_FIRST, _END = (0, 32), (0, 34)
# The releases that CI runs on, each with the torch that it requires.
TESTED = {"0.32.0": "2.13.0", "0.33.0": "2.14.0"}
# Packages that have to be built for the very torch that they run beside. A build for
# another torch breaks whatever imports them.
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")


def unsupported_vllm(found: str | None = None) -> str | None:
    """Say why this vLLM cannot be used, or None if it can.

    Args:
        found: A vLLM version string; by default the installed one's.
    """
    if found is None:
        try:
            found = version("vllm")
        except PackageNotFoundError:
            return f"vLLM is not installed: tidal_vllm needs vllm{SUPPORTED_VLLM}"
    numbers = found.split("+")[0].split(".")
    try:
        major_minor = (int(numbers[0]), int(numbers[1]))
    except (IndexError, ValueError):
        return f"vllm {found}: not a release number; allowed: vllm{SUPPORTED_VLLM}"
    if _FIRST <= major_minor < _END:
        return None
    return (
        f"vllm {found} is outside the supported range: tidal_vllm "
        f"uses internals of vllm{SUPPORTED_VLLM}; "
        f"install one with: pip install 'vllm{SUPPORTED_VLLM}'"
    )
