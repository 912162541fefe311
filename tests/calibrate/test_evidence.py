"""How many tokens prove what."""

import pytest

from tidal_vllm.calibrate.evidence import evidence_needed, wilson_lower


def test_wilson():
    assert wilson_lower(0, 0) == 0.0
    assert wilson_lower(96, 96) == pytest.approx(0.9615, abs=1e-4)
    assert wilson_lower(50, 100) == pytest.approx(0.4038, abs=1e-4)


def test_evidence_needed():
    """Where nothing is lost, as many tokens as z**2 (1 - loss) / loss."""
    assert [evidence_needed(0, loss) for loss in (0.5, 0.1, 0.01)] == [4, 35, 381]
    assert evidence_needed(0, 1.0) == 1
    for lost in (1, 7):
        needed = evidence_needed(lost, 0.02)
        assert wilson_lower(needed - lost, needed) >= 0.98
        assert wilson_lower(needed - 1 - lost, needed - 1) < 0.98
