"""Calibration inside vLLM's workers, wherever they run: methods for `collective_rpc`.

vLLM adds this class to the worker's (`worker_extension_cls`).
"""

from __future__ import annotations

from pathlib import Path

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from tidal_vllm.calibrate.recorder import Recorder
from tidal_vllm.config import TidalConfig
from tidal_vllm.engine.attention import TidalImpl
from tidal_vllm.engine.ranks import agreeing_ranks
from tidal_vllm.engine.reconfigure import reconfigure


def rank_file(folder: str | Path, rank: int) -> Path:
    """Where a rank leaves what it recorded."""
    return Path(folder, f"rank-{rank}.npz")


class CalibrationWorker:
    """What the parent may ask of a worker; one request runs at a time."""

    def calibration_layers(self) -> list[int]:
        """Indices of the layers that take part: those with full attention."""
        return sorted(_full_layers(self.vllm_config))

    def calibration_record(self, settings: list[dict]) -> None:
        """Record decode steps from now on; all layers have to be DENSE.

        Args:
            settings: Keywords of `TidalConfig`, one dict per setting to record for.
        """
        layers = _full_layers(self.vllm_config)
        impl = next(iter(layers.values())).impl
        configs = [TidalConfig(**setting) for setting in settings]
        heads = impl.num_heads, impl.num_kv_heads
        ranks = [agreeing_ranks(c, self.vllm_config, *heads) for c in configs]
        recorder = Recorder(sorted(layers), *heads, configs, ranks)
        for index, layer in layers.items():
            _watch(layer.impl, index, recorder)
        self.calibration_recorder = recorder

    def calibration_stop(self) -> None:
        """Record no more."""
        for layer in _full_layers(self.vllm_config).values():
            layer.impl.__dict__.pop("forward", None)

    def calibration_save(self, folder: str, num_steps: int) -> int:
        """Write this rank's steps to `rank_file` and return how many there are."""
        path = rank_file(folder, get_tensor_model_parallel_rank())
        return self.calibration_recorder.save(path, num_steps)

    def calibration_configure(self, settings: dict) -> None:
        """Run under other settings from now on.

        Args:
            settings: What `additional_config["tidal"]` would hold, complete: whatever
                is left out might come from a profile.
        """
        reconfigure(self.model_runner, settings)


def _full_layers(vllm_config) -> dict:
    """The layers of this worker with full attention, by index."""
    layers = vllm_config.compilation_config.static_forward_context
    found = {}
    for name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, TidalImpl) and impl.sliding_window is None:
            found[extract_layer_index(name)] = layer
    return found


def _watch(impl: TidalImpl, index: int, recorder: Recorder) -> None:
    """Let the recorder see each decode of a layer, after the layer itself."""

    def forward(layer, query, key, value, kv_cache, attn_metadata, output, **more):
        result = type(impl).forward(
            impl, layer, query, key, value, kv_cache, attn_metadata, output, **more
        )
        if attn_metadata is not None and attn_metadata.num_decodes:
            rows = slice(attn_metadata.num_decodes)
            recorder.observe(
                index,
                query[rows],
                kv_cache,
                attn_metadata.block_table[rows],
                attn_metadata.seq_lens[rows],
                impl.scale,
            )
        return result

    impl.forward = forward
