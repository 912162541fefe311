"""The GPUs, the attention shapes and the times that the model computes with."""

from dataclasses import dataclass

BYTES_PER_US = 1e6  # of one TB/s
EMPTY = 0.6  # us, of a thread block that reads the lengths and ends


@dataclass(frozen=True)
class Gpu:
    """What of a GPU decides how long a kernel takes.

    The H100's bandwidth and its empty graph were measured, its other times fitted to
    an audit of the kernels' machine code, and then to measurements where they were
    off. Those of the other GPUs are the H100's; their bandwidth is the H100's, scaled
    by the data sheets.

    Attributes:
        processors: Streaming multiprocessors.
        read_tb_per_s: What a kernel reaches that only reads, 10**12 bytes per second.
            Every share of read is a share of this.
        copy_tb_per_s: What a large copy reaches, reads and writes added.
        gather_share: The most of read_tb_per_s that reading blocks of a KV cache
            reaches.
        store_share: Of read_tb_per_s: the bytes of block_lse, by the time that storing
            them adds to a kernel.
        empty_graph_us: A CUDA graph of one kernel that does nothing, from its start.
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
    read_tb_per_s: float
    copy_tb_per_s: float
    clock_ghz: float
    shared_kib: int
    gather_share: float = 0.95
    # Fitted to dense_decode that keeps scores for blocks of 16 to 1, at 64 x 32K.
    store_share: float = 0.33
    empty_graph_us: float = 4.06
    launch_us: float = 1.2
    dependent_launch_us: float = 0.2
    # Fitted to sparse_decode with 1, 4 and 16 rows of 4096 tokens.
    load_us: float = 0.7
    l2_load_us: float = 0.35
    l2_gb_per_s: float = 110.0

    @property
    def read_bytes_per_us(self) -> float:
        return self.read_tb_per_s * BYTES_PER_US

    @property
    def gather_bytes_per_us(self) -> float:
        return self.gather_share * self.read_bytes_per_us

    @property
    def store_bytes_per_us(self) -> float:
        return self.store_share * self.read_bytes_per_us

    @property
    def graph_us(self) -> float:
        """What starting a graph takes, besides the launches of its kernels."""
        return max(0.0, self.empty_graph_us - self.launch_us - EMPTY)

    def least_us(self, num_bytes: int) -> float:
        """What no op that moves so many bytes can undercut: them, and one launch."""
        return num_bytes / self.read_bytes_per_us + self.launch_us


# The H100 as it was assumed before any was there: a copy as the ceiling of all kernels,
# and no time for a graph to start.
ASSUMED_H100 = Gpu(
    *("h100, assumed", 132, 3.0, 3.0, 1.755, 228),
    store_share=0.95,
    empty_graph_us=0.0,
    load_us=0.5,
)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 132, 3.11, 2.44, 1.755, 228),
        Gpu("h200", 132, 4.46, 3.50, 1.755, 228),
        Gpu("a100", 108, 1.89, 1.49, 1.41, 164),
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
