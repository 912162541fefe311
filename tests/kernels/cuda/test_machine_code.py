"""The table of docs/cuda.md is what today's kernels compile to."""

import json

import pytest

from benchmarks.kernels import machine_code

pytestmark = [pytest.mark.extended, pytest.mark.serial]

KEPT = json.loads(machine_code.RESULTS.read_text())


def test_the_table_shows_the_kept_numbers():
    shown = machine_code.DOCS.read_text().split(machine_code.BEGIN)[1]
    assert shown.split(machine_code.END)[0].strip() == machine_code.table(KEPT)


def test_a_fresh_compile_gives_the_kept_numbers():
    found, wanted = machine_code.nvcc_version(), KEPT[0]["nvcc"]
    if found != wanted:
        pytest.skip(f"nvcc {found or 'is not found'}; the table is of nvcc {wanted}")
    if machine_code.find_nvdisasm() is None:
        pytest.skip("nvdisasm is not found: pip install nvidia-cuda-nvdisasm")
    assert machine_code.measure(KEPT[0]["arch"]) == KEPT


CODE = """
.text.kernel:
.L_x_0:
        /*0000*/                   HMMA.16816.F32 R0, R4, R8, RZ ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   FMUL R0, R0, R1 ;
        /*0030*/                   FMUL R0, R0, R1 ;
.L_x_1:
        /*0040*/                   BRA.DIV UR4, `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_0) ;
"""


def test_the_main_loop_is_counted_with_and_without_its_branches():
    """The way back from .L_x_2 is longer, and for lanes that have parted."""
    assert machine_code.main_loop(CODE) == (6, 4)
