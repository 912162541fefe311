"""The GPUs, the attention shapes and the times that the model computes with."""

from dataclasses import dataclass

BYTES_PER_US = 1e6  # of one TB/s


@dataclass(frozen=True)
class Gpu:
    """What of a GPU decides how long a kernel takes.

    Only the H100's times were fitted, to an audit of the kernels' machine code. Those
    of the others are the H100's; their bandwidth is scaled from their data sheets.

    Attributes:
        processors: Streaming multiprocessors.
        copy_tb_per_s: What a large copy reaches, reads and writes added, 10**12 bytes
            per second. Every share of copy is a share of this.
        gather_share: The most of it that reading blocks of a KV cache reaches.
        clock_ghz: Of the processors, under load.
        shared_kib: Shared memory of one processor.
        launch_us: From the end of one kernel of a CUDA graph to the start of the next.
        dependent_launch_us: The same with programmatic dependent launch.
        load_us: One load that the next instruction waits for, the memory busy.
        l2_load_us: The same where it is found in L2.
        l2_gb_per_s: What one processor reads from L2.
    """

    name: str
    processors: int
    copy_tb_per_s: float
    clock_ghz: float
    shared_kib: int
    gather_share: float = 0.95
    launch_us: float = 1.2
    dependent_launch_us: float = 0.2
    load_us: float = 0.5
    l2_load_us: float = 0.35
    l2_gb_per_s: float = 110.0

    @property
    def copy_bytes_per_us(self) -> float:
        return self.copy_tb_per_s * BYTES_PER_US

    @property
    def gather_bytes_per_us(self) -> float:
        return self.gather_share * self.copy_bytes_per_us

    def least_us(self, num_bytes: int) -> float:
        """What no op that moves so many bytes can undercut: a copy, and one launch."""
        return num_bytes / self.copy_bytes_per_us + self.launch_us


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 132, 3.0, 1.755, 228),
        Gpu("h200", 132, 4.3, 1.755, 228),
        Gpu("a100", 108, 1.82, 1.41, 164),
    )
}


@dataclass(frozen=True)
class Shape:
    """The attention of a model on one rank, and the packaged profile of its roles."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 128
    stored: str = "bf16"
    """Of the KV cache: "bf16" or "fp8"."""

    @property
    def head_token_bytes(self) -> int:
        """Bytes of K and V of one token and KV head."""
        return 2 * self.head_size * (1 if self.stored == "fp8" else 2)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return self.num_kv_heads * self.head_token_bytes

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads


# The configurations that the models were published with, on one GPU.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 32, 32, 8),
        Shape("qwen3-8b", 36, 32, 8),
        Shape("qwen3-14b", 40, 40, 8),
        Shape("llama-3-70b", 80, 64, 8),
    )
}
