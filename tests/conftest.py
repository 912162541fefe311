"""The environment of every test, set before anything imports torch or vLLM."""

import os
import signal

# The models are tiny: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# All models are built by code: a name that is no folder is an error, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A background job ignores SIGINT, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
