"""The extension on a GPU behind the emulator's interface."""

import torch


def to_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, padding included."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.cuda().as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def from_cuda(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy all of the storage back, so that stray writes are seen."""
    every = torch.empty(0, dtype=source.dtype, device=source.device)
    every = every.set_(source.untyped_storage())
    torch.empty(0, dtype=target.dtype).set_(target.untyped_storage()).copy_(every)


class Gpu:
    """Runs ops of torch.ops.tidal on copies of CPU tensors."""

    def run(
        self,
        op: str,
        tensors: dict[str, torch.Tensor],
        outputs: tuple[str, ...],
        **numbers: float,
    ) -> None:
        """Run `op`; the tensors named in `outputs` are written."""
        import tidal_vllm.kernels.cuda  # noqa: F401

        there = {name: to_cuda(tensor) for name, tensor in tensors.items()}
        getattr(torch.ops.tidal, op)(**there, **numbers)
        for name in outputs:
            from_cuda(there[name], tensors[name])
