"""TIDAL is known in every process, whichever way vLLM starts it."""

import pickle
import subprocess
import sys

import cloudpickle
import pytest
from vllm.config import AttentionConfig
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.support.processes import child_environment
from tidal_vllm.engine.backend import TidalBackend
from tidal_vllm.plugin import register

pytestmark = pytest.mark.compat

LOOK_UP = """
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print("before:", "TIDAL" in AttentionBackendEnum.__members__)
"""
UNPICKLE = f"""
import pickle, sys
{LOOK_UP}
member, other = pickle.load(sys.stdin.buffer)
member = getattr(member, "backend", member)
assert member is AttentionBackendEnum["TIDAL"] is AttentionBackendEnum.TIDAL
assert other is AttentionBackendEnum.FLASH_ATTN
print("class:", member.get_class().__name__)
"""
LOAD_PLUGINS = f"""
{LOOK_UP}
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
print("after:", "TIDAL" in AttentionBackendEnum.__members__)
print("platform:", type(current_platform).__name__)
"""


def fresh_process(code, stdin=b"", **env):
    """What a new Python printed, as a dict."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        env=child_environment(**env),
        capture_output=True,
    )
    printed = done.stdout.decode()
    assert done.returncode == 0, printed + done.stderr.decode()
    return dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)


@pytest.fixture(scope="module")
def member():
    load_general_plugins()
    return AttentionBackendEnum["TIDAL"]


def test_registering_again_changes_nothing(member):
    members = dict(AttentionBackendEnum.__members__)
    for _ in range(2):
        register()
    assert dict(AttentionBackendEnum.__members__) == members
    assert AttentionBackendEnum["TIDAL"] is member
    assert member.get_class() is TidalBackend


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_member_pickles_to_itself(member, protocol):
    for each in AttentionBackendEnum:
        assert pickle.loads(pickle.dumps(each, protocol)) is each
    assert cloudpickle.loads(cloudpickle.dumps(member, protocol)) is member


def test_unpickling_before_plugins_are_loaded(member):
    """A spawned engine core gets its config first; here no plug-in is allowed."""
    config = AttentionConfig(backend=member)
    sent = pickle.dumps((config, AttentionBackendEnum.FLASH_ATTN))
    seen = fresh_process(UNPICKLE, sent, VLLM_PLUGINS="")
    assert seen["before"] == "False"
    assert seen["class"] == "TidalBackend"


@pytest.mark.extended
@pytest.mark.parametrize(
    ("plugins", "registered", "platform"),
    [
        ("tidal_cpu", "False", "TidalCpuPlatform"),
        ("tidal", "True", "UnspecifiedPlatform"),
    ],
)
def test_vllm_plugins_filters(plugins, registered, platform):
    seen = fresh_process(LOAD_PLUGINS, VLLM_PLUGINS=plugins)
    assert seen["before"] == "False"
    assert (seen["after"], seen["platform"]) == (registered, platform)
