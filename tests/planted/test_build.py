"""The spec of a planted model, and the folder that is built from it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tidal_vllm.planted import PlantedSpec, build_planted_model, load_spec
from tidal_vllm.planted.spec import CODE_SIZE
from tidal_vllm.planted.weights import MIN_DISTANCE, codes


class TestSpec:
    @pytest.mark.parametrize(
        ("fields", "complaint"),
        {
            "no hops": ({"hops": 0}, r"hops=0: allowed is 1\.\.4"),
            "hops as float": ({"hops": 2.0}, "hops=2.0: allowed are integers"),
            "hops as bool": ({"hops": True}, "hops=True: allowed are integers"),
            "few layers": ({"num_layers": 3}, "num_layers=3"),
            "few layers for hops": ({"hops": 2, "num_layers": 4}, "needs at least 5"),
            "ragged groups": ({"num_heads": 6, "num_kv_heads": 4}, "num_heads=6"),
            "small vocabulary": ({"vocab_size": 63}, "vocab_size=63"),
            "unknown dtype": ({"dtype": "fp8"}, "dtype='fp8': allowed are float32"),
            "hop count": ({"hop_layers": (2, 5)}, "hop_layers=.*hops=1"),
            "hop order": ({"hops": 2, "hop_layers": (2, 2)}, "hop_layers"),
            "hop range": ({"hops": 2, "hop_layers": (2, 8)}, "below num_layers=8"),
            "no room for the alias": ({"hops": 2, "hop_layers": (2, 3)}, "hop_layers"),
            "hop type": ({"hops": 2, "hop_layers": 5}, "hop_layers=5"),
        }.values(),
    )
    def test_refuses(self, fields, complaint):
        with pytest.raises(ValueError, match=complaint):
            PlantedSpec(**fields)

    @pytest.mark.parametrize("num_layers", [7, 8, 16, 32])
    @pytest.mark.parametrize("hops", [1, 2, 3, 4])
    def test_default_roles_are_allowed_ones(self, hops, num_layers):
        spec = PlantedSpec(hops=hops, num_layers=num_layers)
        assert PlantedSpec(
            hops=hops, num_layers=num_layers, hop_layers=spec.select_layers
        )
        assert spec.dense_layers == (0, 1)
        assert len(spec.select_layers) == hops == len(spec.alias_layers) + 1
        assert len(spec.output_layers) >= 1

    @pytest.mark.parametrize("vocab_size", [64, 1000, 16384])
    def test_no_two_codes_look_alike(self, vocab_size):
        words = codes(vocab_size, seed=0)
        assert words.shape == (vocab_size, CODE_SIZE)
        similarity = words[:200] @ words.T
        similarity[range(len(similarity)), range(len(similarity))] = 0
        assert similarity.max() <= CODE_SIZE - 2 * MIN_DISTANCE


class TestBuild:
    def test_reuses_and_replaces(self, tmp_path):
        folder = build_planted_model(tmp_path / "a" / "model", PlantedSpec())
        built = (folder / "model.safetensors").stat()
        assert build_planted_model(folder, PlantedSpec()) == folder
        assert (folder / "model.safetensors").stat() == built
        other = PlantedSpec(hops=2)
        build_planted_model(folder, other)
        assert load_spec(folder) == other
        assert [path.name for path in folder.parent.iterdir()] == ["model"]

    def test_equal_specs_build_equal_files(self, tmp_path):
        files = [
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (
                build_planted_model(tmp_path / name, PlantedSpec(num_layers=4))
                for name in "ab"
            )
        ]
        assert files[0] == files[1]

    def test_leaves_foreign_folders_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("dear")
        with pytest.raises(ValueError, match="out_dir=.*something else"):
            build_planted_model(tmp_path, PlantedSpec())
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
        with pytest.raises(ValueError, match="planted.json"):
            load_spec(tmp_path)

    def test_config_is_a_plain_llama(self, planted):
        spec, folder = planted(hops=2)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["head_dim"] == spec.head_size == 128
        assert config["hidden_size"] == spec.hidden_size == 256
        assert (folder / "model.safetensors").stat().st_size < 20e6

    def test_import_is_light(self):
        root = Path(__file__).parents[2]
        heavy = "{'torch', 'vllm', 'transformers', 'tokenizers', 'safetensors'}"
        script = f"import sys, tidal_vllm.planted; print({heavy} & sys.modules.keys())"
        output = subprocess.run(
            [sys.executable, "-c", script],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        assert output.stdout.strip() == "set()"
