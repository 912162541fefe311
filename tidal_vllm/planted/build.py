"""Write a planted model as a Hugging Face checkpoint folder."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

from tidal_vllm.planted.spec import BOS, EOS, HEAD_SIZE, PAD, ROPE_THETA, PlantedSpec
from tidal_vllm.planted.tokenizer import write_tokenizer
from tidal_vllm.planted.weights import INTERMEDIATE_SIZE, state_dict

MARKER = "planted.json"
# NOTE: raise it whenever a spec comes to build other files, or old ones are reused.
FORMAT = 1


def build_planted_model(out_dir: str | Path, spec: PlantedSpec) -> Path:
    """Write the checkpoint of ``spec`` to ``out_dir``, or reuse the one there.

    The folder appears complete or not at all: it is built beside ``out_dir`` and
    renamed. A planted model of another spec is replaced; anything else is left alone.

    Args:
        out_dir: The model folder; parents are made.
        spec: The model.

    Returns:
        The folder: config.json, generation_config.json, model.safetensors,
        tokenizer.json, tokenizer_config.json and planted.json (the spec).

    Raises:
        ValueError: ``out_dir`` exists and is no planted model.
    """
    out = Path(out_dir).absolute()
    marker = _marker(spec)
    if _read_marker(out) == marker:
        return out
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch, "new")
        folder.mkdir()
        _write_files(folder, spec, marker)
        if out.exists():
            os.rename(out, Path(scratch, "old"))
        try:
            os.rename(folder, out)
        except OSError:
            if _read_marker(out) != marker:
                raise
    return out


def load_spec(model_dir: str | Path) -> PlantedSpec:
    """The spec a planted model's folder was built from.

    Raises:
        ValueError: The folder holds no planted model of this version.
    """
    marker = _read_marker(Path(model_dir))
    if marker is None or marker.get("format") != FORMAT:
        raise ValueError(f"{model_dir}: no {MARKER} of format {FORMAT} there")
    return PlantedSpec(**marker["spec"])


def _marker(spec: PlantedSpec) -> dict:
    return json.loads(json.dumps({"format": FORMAT, "spec": dataclasses.asdict(spec)}))


def _read_marker(folder: Path) -> dict | None:
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and _read_marker(out) is None):
        raise ValueError(
            f"out_dir={str(out)!r}: allowed are a new or empty folder or a planted "
            "model's; this one holds something else"
        )


def _write_files(folder: Path, spec: PlantedSpec, marker: dict) -> None:
    from safetensors.torch import save_file

    save_file(state_dict(spec), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder, spec)
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": spec.dtype,
        **special,
    }
    files = {
        "config.json": config,
        "generation_config.json": {"do_sample": False, **special},
        MARKER: marker,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
