#!/usr/bin/env bash
# Set up and run everything: lint and format of all languages, docs, Rust, C and Python tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"

# step NAME COMMAND...: runs it and says how long it took; the first failure ends the script.
step() {
    local name=$1 begin=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || return
    printf '== %s: %d s\n' "$name" "$((SECONDS - begin))"
}

# on_files TOOL... -- PATTERN...: runs the tool over the files in git that match.
on_files() {
    local tool=()
    while [[ $1 != -- ]]; do
        tool+=("$1")
        shift
    done
    shift
    git ls-files -z "$@" | xargs -0 -r "${tool[@]}"
}

export CARGO_TERM_COLOR=never
step "set-up" scripts/setup.sh --dev
bin=.venv/bin
step "Rust format" cargo fmt --check
step "C and C++ format" on_files "$bin/clang-format" --dry-run -Werror -- 'tests/*.c' 'tests/*.cpp' 'tests/*.h' 'kernels/*.cu' 'kernels/*.cuh'
step "Python format" "$bin/ruff" format --check .
step "Python lint" "$bin/ruff" check .
step "shell lint" on_files "$bin/shellcheck" -- '*.sh' '*.sbatch' .ci/run
step "Rust lint" cargo clippy --all-targets --quiet -- -D warnings
step "Rust docs" env RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
# torch's wheels bring NVRTC, with which the kernels are compiled; no GPU is needed for that.
FORGE_NVRTC=${FORGE_NVRTC:-$(find "$PWD/.venv/lib" -name 'libnvrtc.so.1[23]' | sort | tail -n 1)}
export FORGE_NVRTC
# The two halves beside each other: kernels are compiled on all processors, most of the rest waits.
step "Rust tests, built" cargo test --quiet --no-run
# Joined by &&: in a condition, as these are called, bash does not end at a failure by itself.
rust_half() {
    step "Rust and C tests" cargo test --quiet &&
        if [[ $(uname -sm) == "Linux x86_64" ]]; then
            step "AddressSanitizer" scripts/sanitize.sh
        fi
}
python_half() {
    step "Python tests" "$bin/python" -m pytest -q tests/python &&
        step "Megatron tests" "$bin/python" -m pytest -q tests/megatron &&
        step "Megatron tests, 0.16.1" env FORGE_MEGATRON="$PWD/.venv/older" "$bin/python" -m pytest -q tests/megatron/test_megatron.py &&
        step "SLURM tests" "$bin/python" -m pytest -q tests/slurm &&
        step "demo tests" "$bin/python" -m pytest -q tests/demo
}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
# In a process group of its own, so that it ends as a whole when the other half has failed.
set -m
python_half >"$output" 2>&1 &
python=$!
set +m
if ! rust_half; then
    kill -TERM -- "-$python" 2>/dev/null || true
    exit 1
fi
status=0
wait "$python" || status=$?
cat "$output"
((status == 0)) || exit "$status"
printf '\nall of it passed in %d s\n' "$SECONDS"
