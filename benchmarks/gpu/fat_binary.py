"""Fat binaries: the machine code and PTX of several GPUs inside one compiled module.

A compiled module holds many of them, each behind a header: u32 magic, u16 version,
u16 bytes of the header, u64 bytes that follow (NVIDIA's `fatBinaryHeader`). NVIDIA
documents no more than that. What follows was read off modules that nvcc 13 has made:
entries, one after the other, each a header (u16 kind, u32 at byte 4 its own bytes, u64
at byte 8 the bytes of its content, u32 at byte 28 the GPU) and its content. The GPU is
a compute capability without its point, 90 for 9.0. All numbers are little-endian.
"""

import struct

MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2
HEADER_BYTES = 16
_ENTRY = struct.Struct("<H2xIQ12xI")
_MAGIC_AND_VERSION = struct.pack("<IHH", MAGIC, 1, HEADER_BYTES)


def zero_others(module: bytearray, gpu: int) -> tuple[int, int]:
    """Zero the contents that are not machine code of one GPU, in place.

    No length changes, so a loader finds everything where it was, and zeros compress to
    nothing. A kernel that has no machine code of this GPU is lost, its PTX too.

    Args:
        module: All bytes of a compiled module, changed here.
        gpu: The compute capability without its point.

    Returns:
        Bytes of content that were kept, and bytes that were zeroed.

    Raises:
        ValueError: Entries are not as described above.
    """
    kept = zeroed = 0
    at = module.find(_MAGIC_AND_VERSION)
    while at >= 0:
        begin = at + HEADER_BYTES
        end = begin + int.from_bytes(module[at + 8 : begin], "little")
        at = begin
        while at < end:
            if at + _ENTRY.size > len(module):
                raise ValueError(f"byte {at:#x}: a fat binary that is cut off")
            kind, header, content, of = _ENTRY.unpack_from(module, at)
            begin, after = at + header, at + header + content
            unknown = kind not in (PTX, MACHINE_CODE) or header < _ENTRY.size
            if unknown or after > min(end, len(module)):
                raise ValueError(f"byte {at:#x}: no known entry of a fat binary")
            if kind == MACHINE_CODE and of == gpu:
                kept += content
            else:
                zeroed += content
                module[begin:after] = bytes(content)
            at = after
        at = module.find(_MAGIC_AND_VERSION, end)
    return kept, zeroed
