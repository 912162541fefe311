#!/usr/bin/env bash
# Everything to do on a GPU machine, in one command: see docs/gpu.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
