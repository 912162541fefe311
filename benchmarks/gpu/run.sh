#!/usr/bin/env bash
# Everything to do on a GPU machine without a network, in order of worth. Not yet run
# on one.
#
#   benchmarks/gpu/run.sh               all parts that are not done yet
#   benchmarks/gpu/run.sh tests stack   these, done or not
#   benchmarks/gpu/run.sh --list        the parts, and which are done
#   benchmarks/gpu/run.sh --dry-run ... print the commands only
#
# Each part ends within 10 minutes. Results are JSON lines in $OUT/gpu.jsonl (default
# benchmarks/gpu/out), what was printed in $OUT/PART.log, parts that are done in $OUT/done.
#
#   PACKED   folder with part-00, part-01, ... or site.tar.xz: vLLM and what it imports,
#            packed where there was a network; not needed where vLLM is installed
#   SITE     where that is unpacked (default /tmp/site)
#   PYTHON   the interpreter that has torch (default python3)
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
OUT=${OUT:-$ROOT/benchmarks/gpu/out}
SITE=${SITE:-/tmp/site}
PACKED=${PACKED:-}
PYTHON=${PYTHON:-python3}
LIMIT=590 # seconds a part
PARTS=(site smoke build tests stack sparse dense select engine engine_128k)

dry=
selected=()
for argument in "$@"; do
    case $argument in
    --dry-run) dry=1 ;;
    --list)
        for part in "${PARTS[@]}"; do
            grep -qsx "$part" "$OUT/done" && echo "$part done" || echo "$part"
        done
        exit
        ;;
    *)
        if [[ " ${PARTS[*]} " != *" $argument "* ]]; then
            echo "$argument: no such part; allowed: ${PARTS[*]} --dry-run --list" >&2
            exit 2
        fi
        selected+=("$argument")
        ;;
    esac
done

# The folder itself: the extension and the entry points lie in it.
export PYTHONPATH=$SITE:$ROOT
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

run() {
    echo "+ $*"
    [[ $dry ]] || "$@"
}
bench() { # a module below benchmarks/, and its arguments
    run "$PYTHON" -m "benchmarks.$1" --out "$OUT/gpu.jsonl" "${@:2}"
}

do_site() {
    local find='import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))'
    if [[ ! $dry ]] && "$PYTHON" -c "$find"; then
        echo "vLLM is here"
        return
    fi
    if [[ ! $PACKED && ! $dry ]]; then
        echo "vLLM is not installed; PACKED must name the folder of the packed site" >&2
        return 1
    fi
    run mkdir -p "$SITE"
    run bash -c "cat '$PACKED'/part-* '$PACKED'/site.tar.xz 2>/dev/null | tar -xJ -C '$SITE'"
}
do_smoke() {
    # The entry points through which vLLM finds the package.
    run "$PYTHON" setup.py -q egg_info
    run "$PYTHON" -m tidal_vllm.cli doctor
    local model=(--cases 4x4096 --rounds 1)
    bench engine.decode_engine --dummy-weights "${model[@]}" --kernels triton
}
do_build() {
    run env TIDAL_BUILD_CUDA=1 "$PYTHON" setup.py -q egg_info build_ext --inplace
    run "$PYTHON" -m tidal_vllm.cli doctor
}
do_tests() {
    run "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/parity \
        tests/kernels/cuda/test_gpu_parity.py
}
do_stack() { bench kernels.bench_stack; }
do_sparse() { bench kernels.bench_sparse_decode; }
do_dense() { bench kernels.bench_dense_decode; }
do_select() { bench kernels.bench_select; }
do_engine() {
    bench engine.decode_engine --dummy-weights --cases 16x32768 64x1024 64x8192
}
do_engine_128k() {
    bench engine.decode_engine --dummy-weights --cases 6x131072 1x131072
}

failed=()
if [[ ${#selected[@]} -eq 0 ]]; then
    for part in "${PARTS[@]}"; do
        grep -qsx "$part" "$OUT/done" || selected+=("$part")
    done
fi
mkdir -p "$OUT"
for part in "${selected[@]}"; do
    echo "== $part"
    begun=$SECONDS
    if [[ $dry ]]; then
        "do_$part"
        continue
    fi
    # In a shell of its own, so that the time limit reaches what it starts.
    if timeout "$LIMIT" bash -c "$(declare -f run bench "do_$part")
        set -euo pipefail
        $(declare -p ROOT OUT SITE PACKED PYTHON dry)
        do_$part" 2>&1 | tee "$OUT/$part.log"; then
        echo "$part" >>"$OUT/done"
        echo "== $part done in $((SECONDS - begun)) s"
    else
        failed+=("$part")
        echo "== $part FAILED after $((SECONDS - begun)) s, see $OUT/$part.log"
        # Nothing runs without these.
        [[ $part == site ]] && break
    fi
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
