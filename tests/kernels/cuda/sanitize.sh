#!/usr/bin/env bash
# Runs the kernels on a GPU under compute-sanitizer, which checks addresses, races in
# shared memory, and barriers. Needs the extension built; each tool takes minutes. This
# script has not yet been run.
#
#   tests/kernels/cuda/sanitize.sh [memcheck|racecheck|synccheck ...]
set -euo pipefail
cd "$(dirname "$0")/../../.."
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck)
for tool in "${tools[@]}"; do
    echo "compute-sanitizer --tool $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider \
        tests/kernels/cuda/test_gpu_parity.py -k "same_bits"
done
