"""A GGUF file becomes an ordinary Hugging Face folder."""

import importlib.util
from pathlib import Path

from tidal_vllm.models.known import ModelError

# The extra `models` of pyproject.toml.
NEEDED = ("gguf", "accelerate")


def check_packages() -> None:
    """Refuse before anything is fetched.

    Raises:
        ModelError: A package that reads GGUF files is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        # What they require in turn comes with vLLM; with torch's requirements pip
        # would fetch gigabytes that a machine without a GPU does not need.
        raise ModelError(
            f"{' and '.join(missing)} {verb} needed to convert a model: "
            f"pip install --no-deps {names}"
        )


def convert(gguf: Path, out: Path) -> None:
    """Write the model, its tokenizer and its chat template to a folder.

    The weights are what the file's quantised ones stand for, exactly, in float32.

    Args:
        gguf: The file.
        out: An empty folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **where
    )
    config = read.config
    # transformers refuses to save what it read from a GGUF file.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
