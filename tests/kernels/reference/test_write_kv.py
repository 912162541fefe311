import pytest
import torch

from tests.kernels.batches import DTYPES, LAYOUTS
from tidal_vllm.kernels.reference import write_kv


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_writes_the_given_slots_and_no_other(layout, dtype, slot_dtype):
    cache = LAYOUTS[layout](4, 3, 16, 8, dtype)
    slots = torch.tensor([17, -1, 0, 63, -1, 31], dtype=slot_dtype)
    key, value = torch.randn(2, 8, 3, 4)  # two tokens more than slots: padding
    write_kv(key, value, cache, slots)
    written = torch.zeros(4, 16, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            row = cache[slot // 16, :, slot % 16]
            assert torch.equal(row[:, :4], key[token].to(dtype))
            assert torch.equal(row[:, 4:], value[token].to(dtype))
            written[slot // 16, slot % 16] = True
    assert cache.transpose(1, 2)[~written].isnan().all()


def test_nothing_to_write():
    cache = LAYOUTS["LBNHC"](2, 1, 16, 8, torch.float32)
    nothing = torch.zeros(0, 1, 4)
    write_kv(nothing, nothing, cache, torch.zeros(0, dtype=torch.int64))
    assert cache.isnan().all()


def test_shapes_that_do_not_fit_are_refused():
    cache = LAYOUTS["LBNHC"](2, 1, 16, 8, torch.float32)
    with pytest.raises(ValueError, match="2 \\* head_size"):
        write_kv(*torch.zeros(2, 1, 1, 5), cache, torch.tensor([3]))
