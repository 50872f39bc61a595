#!/usr/bin/env bash
# Run GPU tests, sanitizer, benchmarks and a short training from a prebuilt wheel.
# `scripts/gpu_suite.sh --help`.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: scripts/gpu_suite.sh [--wheel FILE] [--out DIR] [PART ...]

Installs a prebuilt forge_train wheel in a temporary directory and runs, without Rust and without a
network, on one NVIDIA GPU:

  tests     tests/gpu under pytest                     → tests.json
  sanitize  compute-sanitizer, all four tools          → sanitize.json, sanitize_*.txt
  bench     the benchmarks and their plots             → wgrad_update.json, compile_time.json,
                                                         peak_memory.json, rules.json,
                                                         small_layers.json, fp32_products.json, targets.txt,
                                                         *.svg, *.png
  train     the demo in fp32 on the CPU and on the GPU → train.json
  all       all four, in this order (default)
  llama     the next piece of a step of Llama-3.1-8B   → llama_step.json, llama_targets.txt and plots
  converge  a training in every format, on real text   → convergence.json, convergence_targets.txt and plots

The last two go on where the last run of the same commit stopped.

  --wheel FILE  the wheel (default: the newest forge_train-*.whl in dist/)
  --out DIR     where results go (default: benchmarks/results/<device>/)
  -h, --help    this text

A part that fails or runs out of time does not keep the next from running; the exit status is 1 then.

Environment:
  PYTHON            interpreter with torch, triton, numpy, pytest and matplotlib (default: python3)
  FORGE_WHEELS      directory of more wheels to install: cffi, megatron-core, whatever is missing
  FORGE_COMMIT      commit to name in the results (default: git's)
  FORGE_LIMIT_TESTS, FORGE_LIMIT_SANITIZE (each tool), FORGE_LIMIT_BENCH, FORGE_LIMIT_TRAIN,
  FORGE_LIMIT_LLAMA, FORGE_LIMIT_CONVERGE
                    seconds that a part may take (default: 420, 240, 420, 240, 560, 560)
  FORGE_TEST_ARGS, FORGE_BENCH_ARGS, FORGE_SANITIZER_ARGS, FORGE_LLAMA_ARGS, FORGE_CONVERGE_ARGS
                    more arguments for pytest, wgrad_update.py, compute-sanitizer, llama_step.py and
                    convergence.py
  FORGE_SANITIZER_TOOLS
                    which of its tools (default: memcheck racecheck initcheck synccheck)
USAGE
}

fail() {
    printf 'gpu_suite: %s\n' "$*" >&2
    exit 2
}

wheel=
out=
parts=()
while (($#)); do
    case $1 in
        --wheel | --out)
            (($# >= 2)) || fail "$1 needs an argument"
            if [[ $1 == --wheel ]]; then wheel=$2; else out=$2; fi
            shift 2
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        tests | sanitize | bench | train | llama | converge)
            parts+=("$1")
            shift
            ;;
        all)
            parts+=(tests sanitize bench train)
            shift
            ;;
        *)
            usage >&2
            fail "unknown argument: $1"
            ;;
    esac
done
((${#parts[@]})) || parts=(tests sanitize bench train)
# Relative to where the script was started, not to the repository.
[[ -z $wheel ]] || wheel=$(realpath "$wheel")
[[ -z $out ]] || out=$(realpath -m "$out")
[[ -z ${FORGE_WHEELS-} ]] || FORGE_WHEELS=$(realpath "$FORGE_WHEELS")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if [[ -z $wheel ]]; then
    for candidate in dist/forge_train-*.whl; do
        if [[ -f $candidate && (-z $wheel || $candidate -nt $wheel) ]]; then wheel=$candidate; fi
    done
fi
[[ -f $wheel ]] || fail "no wheel: give --wheel FILE, or put one in dist/"

scratch=$(mktemp -d "${TMPDIR:-/tmp}/forge-gpu-suite-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
wheels=("$wheel")
if [[ -n ${FORGE_WHEELS-} ]]; then
    for candidate in "$FORGE_WHEELS"/*.whl; do
        # Two versions of one package would stop pip.
        if [[ -f $candidate && $(basename "$candidate") != forge_train-* ]]; then
            wheels+=("$candidate")
        fi
    done
fi
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --no-cache-dir --target "$scratch/site" "${wheels[@]}"
export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
# Every part compiles the same kernels. compile_time.py takes a cache of its own.
export FORGE_CACHE_DIR=${FORGE_CACHE_DIR:-$scratch/cache}
unset FORGE_LIBRARY FORGE_HEADER
mkdir -p "$FORGE_CACHE_DIR"
if [[ -z ${FORGE_COMMIT-} ]]; then
    FORGE_COMMIT=$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)
fi
export FORGE_COMMIT

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "$python's torch sees no NVIDIA GPU"
"$python" -c 'import forge_train' ||
    fail "the wheel cannot be imported; FORGE_WHEELS names a directory of wheels it needs, such as cffi"
out=${out:-benchmarks/results/$("$python" benchmarks/suite_summary.py folder)}
mkdir -p "$out"
printf 'gpu_suite: %s at %s, results in %s\n' "$(basename "$wheel")" "$FORGE_COMMIT" "$out"

# limited SECONDS COMMAND...: pytest writes its report when it is interrupted, so that comes first.
limited() {
    local seconds=$1
    shift
    timeout --signal=INT --kill-after=20 "$seconds" "$@"
}

part_tests() {
    local arguments begin=$SECONDS status=0
    read -ra arguments <<<"${FORGE_TEST_ARGS-}"
    limited "${FORGE_LIMIT_TESTS:-420}" "$python" -m pytest tests/gpu -q -p no:cacheprovider \
        --continue-on-collection-errors --junitxml="$scratch/tests.xml" "${arguments[@]}" || status=$?
    "$python" benchmarks/suite_summary.py tests --out "$out/tests.json" --status "$status" \
        --seconds "$((SECONDS - begin))" --conditions "pytest tests/gpu, from the wheel" \
        "$scratch/tests.xml"
}

# in_parts OUTPUT COMMAND...: COMMAND tests/gpu/sanitize.py in eight processes, which share the cases; their
# output, one after the other, and the highest of their exit statuses.
in_parts() {
    local output=$1 part count=8 status highest=0 processes=() name
    # A process that was killed may still write: not into the next tool's output.
    name=$scratch/$(basename "$output" .txt)
    shift
    for ((part = 1; part <= count; part++)); do
        limited "${FORGE_LIMIT_SANITIZE:-240}" "$@" tests/gpu/sanitize.py --part "$part/$count" \
            >"$name-$part.txt" 2>&1 &
        processes+=("$!")
    done
    for part in "${processes[@]}"; do
        status=0
        wait "$part" || status=$?
        if ((status > highest)); then highest=$status; fi
    done
    for ((part = 1; part <= count; part++)); do cat "$name-$part.txt"; done >"$output"
    return "$highest"
}

part_sanitize() {
    local sanitizer tool tools arguments status runs=() processes=()
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [[ ! -x $sanitizer ]]; then
        echo "gpu_suite: compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin" >&2
        return 1
    fi
    read -ra arguments <<<"${FORGE_SANITIZER_ARGS-}"
    # Compiled outside of the tool, so that its time goes into checking.
    in_parts "$scratch/plain.txt" "$python" || {
        tail -n 20 "$scratch/plain.txt"
        return 1
    }
    read -ra tools <<<"${FORGE_SANITIZER_TOOLS:-memcheck racecheck initcheck synccheck}"
    # All tools at once: they keep the processors busy, and the GPU is idle most of the time.
    for tool in "${tools[@]}"; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 in_parts "$out/sanitize_$tool.txt" "$sanitizer" \
            --tool "$tool" --error-exitcode 9 --print-limit 20 "${arguments[@]}" "$python" &
        processes+=("$!")
    done
    for tool in "${tools[@]}"; do
        status=0
        wait "${processes[0]}" || status=$?
        processes=("${processes[@]:1}")
        runs+=("$tool=$status=$out/sanitize_$tool.txt")
    done
    "$python" benchmarks/suite_summary.py sanitize --out "$out/sanitize.json" \
        --conditions "compute-sanitizer over tests/gpu/sanitize.py, each tensor an allocation" \
        "${runs[@]}"
}

part_bench() {
    local arguments status=0 limit=${FORGE_LIMIT_BENCH:-420}
    read -ra arguments <<<"${FORGE_BENCH_ARGS-}"
    # The small ones first; the large one fills the time that is left.
    limited 120 "$python" benchmarks/compile_time.py --out "$out/compile_time.json" || status=1
    limited 60 "$python" benchmarks/peak_memory.py --out "$out/peak_memory.json" || status=1
    limited 150 "$python" benchmarks/rules.py --out "$out/rules.json" || status=1
    limited 60 "$python" benchmarks/small_layers.py --out "$out/small_layers.json" || status=1
    limited 60 "$python" benchmarks/fp32_products.py --out "$out/fp32_products.json" || status=1
    limited "$limit" "$python" benchmarks/wgrad_update.py --budget-s "$((limit - 20))" \
        --out "$out/wgrad_update.json" "${arguments[@]}" || status=1
    if [[ -f $out/wgrad_update.json ]]; then
        limited 60 "$python" benchmarks/plot_wgrad_update.py "$out/wgrad_update.json" || status=1
        # Missed targets are a result like any other; they do not fail the part.
        "$python" benchmarks/wgrad_update.py --check "$out/wgrad_update.json" >"$out/targets.txt" || true
        grep -E '^(FAIL|INVALID)' "$out/targets.txt" | head -n 40 || true
        tail -n 1 "$out/targets.txt"
    fi
    return "$status"
}

part_train() {
    local device steps=${FORGE_TRAIN_STEPS:-50}
    if ! "$python" -c 'import megatron.core' 2>/dev/null; then
        echo "gpu_suite: train needs megatron-core; put its wheel into FORGE_WHEELS" >&2
        return 1
    fi
    for device in cpu cuda; do
        limited "${FORGE_LIMIT_TRAIN:-240}" "$python" -m forge_train.demo --device "$device" --tp 1 \
            --weight-format fp32 --steps "$steps" --save-interval 0 --out "$scratch/runs" \
            --name "$device" >"$scratch/train_$device.txt" 2>&1 || {
            tail -n 20 "$scratch/train_$device.txt"
            echo "gpu_suite: the run on $device failed" >&2
        }
    done
    "$python" benchmarks/suite_summary.py train --out "$out/train.json" --limit 1e-4 \
        --conditions "demo, fp32, TP=1, $steps steps, the same seed" \
        "$scratch/runs/cpu" "$scratch/runs/cuda"
}

# benchmark_of NAME LIMIT TARGETS ARGUMENTS...: what a run of the same commit has not measured yet.
benchmark_of() {
    local name=$1 limit=$2 targets=$3 status=0
    shift 3
    limited "$limit" "$python" "benchmarks/$name.py" --budget-s "$((limit - 20))" --resume \
        --out "$out/$name.json" "$@" || status=1
    if [[ -f $out/$name.json ]]; then
        limited 60 "$python" "benchmarks/plot_$name.py" "$out/$name.json" || status=1
        # Missed targets are a result like any other; they do not fail the part.
        "$python" "benchmarks/$name.py" --check "$out/$name.json" | tee "$out/$targets.txt" || true
    fi
    return "$status"
}

part_llama() {
    local arguments
    read -ra arguments <<<"${FORGE_LLAMA_ARGS-}"
    benchmark_of llama_step "${FORGE_LIMIT_LLAMA:-560}" llama_targets "${arguments[@]}"
}

part_converge() {
    local arguments
    read -ra arguments <<<"${FORGE_CONVERGE_ARGS-}"
    benchmark_of convergence "${FORGE_LIMIT_CONVERGE:-560}" convergence_targets \
        "${arguments[@]}"
}

failed=()
for part in "${parts[@]}"; do
    begin=$SECONDS
    printf '\n== %s\n' "$part"
    # A function called in a condition runs without `set -e`: each one takes care of its statuses.
    if "part_$part"; then verdict=passed; else
        verdict=FAILED
        failed+=("$part")
    fi
    printf '== %s %s, %d s\n' "$part" "$verdict" "$((SECONDS - begin))"
done
printf '\ngpu_suite: %d of %d parts failed%s, %d s; results in %s\n' "${#failed[@]}" "${#parts[@]}" \
    "${failed[*]:+: ${failed[*]}}" "$SECONDS" "$out"
((${#failed[@]} == 0))
