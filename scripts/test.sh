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
    "$@"
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
step "shell lint" on_files "$bin/shellcheck" -- '*.sh' .ci/run
step "Rust lint" cargo clippy --all-targets --quiet -- -D warnings
step "Rust docs" env RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
# torch's wheels bring NVRTC, with which the kernels are compiled; no GPU is needed for that.
FORGE_NVRTC=${FORGE_NVRTC:-$(find "$PWD/.venv/lib" -name 'libnvrtc.so.1[23]' | sort | tail -n 1)}
export FORGE_NVRTC
step "Rust and C tests" cargo test --quiet
[[ $(uname -sm) != "Linux x86_64" ]] || step "AddressSanitizer" scripts/sanitize.sh
step "Python tests" "$bin/python" -m pytest -q tests/python
step "Megatron tests" "$bin/python" -m pytest -q tests/megatron
step "demo tests" "$bin/python" -m pytest -q tests/demo
printf '\nall of it passed in %d s\n' "$SECONDS"
