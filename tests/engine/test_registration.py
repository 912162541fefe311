"""TIDAL is known in every process, whichever way vLLM starts it."""

import multiprocessing
import pickle
import subprocess
import sys

import cloudpickle
import pytest
from vllm.config import AttentionConfig
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tidal_vllm.backend import TidalBackend
from tidal_vllm.plugin import register

from .harness import child_environment

pytestmark = [pytest.mark.compat, pytest.mark.timeout(180)]

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
        timeout=150,
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


@pytest.mark.parametrize(
    ("dumps", "env"),
    [(pickle.dumps, {"VLLM_PLUGINS": ""}), (cloudpickle.dumps, {})],
    ids=["pickle, no plug-in allowed", "cloudpickle"],
)
def test_unpickling_before_plugins_are_loaded(member, dumps, env):
    """A spawned engine core gets its config first; Ray's workers get cloudpickles."""
    config = AttentionConfig(backend=member)
    sent = dumps((config, AttentionBackendEnum.FLASH_ATTN))
    seen = fresh_process(UNPICKLE, sent, **env)
    assert seen["before"] == "False"
    assert seen["class"] == "TidalBackend"


def receive(member, sender):
    sender.send((member.name, member.get_class().__name__))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_multiprocessing(member, method):
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=receive, args=(member, sender))
    child.start()
    try:
        sender.close()  # so that a child that dies ends the wait
        assert receiver.poll(timeout=120)
        assert receiver.recv() == ("TIDAL", "TidalBackend")
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize(
    ("plugins", "registered", "platform"),
    [
        (None, "True", "TidalCpuPlatform"),
        ("tidal_cpu", "False", "TidalCpuPlatform"),
        ("tidal", "True", "UnspecifiedPlatform"),
        ("", "False", "UnspecifiedPlatform"),
    ],
)
def test_vllm_plugins_filters(plugins, registered, platform):
    env = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    seen = fresh_process(LOAD_PLUGINS, **env)
    assert seen["before"] == "False"
    assert (seen["after"], seen["platform"]) == (registered, platform)
