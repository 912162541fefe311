"""`tidal-vllm calibrate` in this process, with an engine of little memory."""

import json

from tidal_vllm import cli

ENGINE = {"kv_cache_memory_bytes": 1 << 26, "block_size": 16}
# A loss of 0.1 takes 35 tokens to prove; 3 prompts of a planted model give 24.
QUICK = ["--num-prompts", "3", "--context", "400", "--budget", "64"]
QUICK += ["--max-loss", "0.1"]


def calibrate(*arguments, **engine) -> int:
    """Run the command; return its exit code."""
    engine_args = json.dumps(ENGINE | engine)
    return cli.main(["calibrate", *map(str, arguments), "--engine-args", engine_args])
