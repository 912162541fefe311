"""The README's Python example, run as it stands on a planted model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidal_vllm.planted import make_prompt

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.extended
def test_readme_example_runs(served, tmp_path):
    prompt = make_prompt(served.spec, 300, 0.5, seed=1)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(
        example.replace("MODEL", str(served.folder)).replace(
            "A long prompt ...", prompt.text
        )
    )
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert prompt.answer_text in done.stdout
