#!/usr/bin/env bash
# Coverage-guided fuzzing of the C ABI under AddressSanitizer: `scripts/fuzz.sh --help`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"

usage() {
    cat <<'USAGE'
usage: scripts/fuzz.sh [--build | --seeds] [SECONDS] [TARGET ...]

Builds the targets of fuzz/ with libFuzzer and AddressSanitizer, and runs each for SECONDS (default:
60), one process at a time, from the committed corpus. Targets: c_abi, state_import (default: both).
Stable Rust is enough; nothing is installed.

  --build   only builds
  --seeds   adds to fuzz/corpus/TARGET the smallest inputs that cover what was found and is not
            covered by it yet

What is found lies in fuzz/artifacts/TARGET; `TARGET FILE` runs one input again. New inputs of the
corpus are kept in FORGE_FUZZ_DIR (default: <target directory>/fuzz), so that runs add up.
USAGE
}

mode=run
seconds=60
targets=()
for argument; do
    case $argument in
        -h | --help)
            usage
            exit 0
            ;;
        --build | --seeds) mode=${argument#--} ;;
        c_abi | state_import) targets+=("$argument") ;;
        *[!0-9]* | "")
            usage >&2
            exit 2
            ;;
        *) seconds=$argument ;;
    esac
done
((${#targets[@]})) || targets=(c_abi state_import)

host=$(rustc -vV | sed -n 's/^host: //p')
build=${CARGO_TARGET_DIR:-$root/target}/fuzz
work=${FORGE_FUZZ_DIR:-$build}
# What cargo-fuzz passes, for which it wants a nightly compiler. RUSTC_BOOTSTRAP lets the stable one
# take -Z flags: they change the instrumentation of this build and nothing that is shipped.
flags=(
    --cfg fuzzing --cfg forge_asan
    -Zsanitizer=address
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
)
RUSTC_BOOTSTRAP=1 RUSTFLAGS="${flags[*]}" CARGO_TARGET_DIR=$build \
    cargo build --quiet --release --locked --manifest-path "$root/fuzz/Cargo.toml" --target "$host"
[[ $mode != build ]] || exit 0

# -detect_leaks=0 puts the search for leaks off until the end of a run; after each input it takes
# most of the time. The quarantine of freed memory is small for the same reason.
export ASAN_OPTIONS=${ASAN_OPTIONS:-quarantine_size_mb=64}
for target in "${targets[@]}"; do
    corpus=$root/fuzz/corpus/$target found=$root/fuzz/artifacts/$target
    mkdir -p "$corpus" "$found" "$work/corpus/$target"
    program=$build/$host/release/$target
    if [[ $mode == seeds ]]; then
        # Small inputs only, and only where they reach code that is not reached yet: how often it is
        # reached matters to the fuzzer, not to who replays the seeds.
        small=$(mktemp -d)
        find "$work/corpus/$target" -type f -size -2 -exec cp -t "$small" {} +
        "$program" -set_cover_merge=1 -use_counters=0 -detect_leaks=0 "$corpus" "$small"
        rm -r "$small"
    else
        "$program" -max_total_time="$seconds" -max_len=512 -timeout=60 -rss_limit_mb=4096 \
            -detect_leaks=0 -print_final_stats=1 -artifact_prefix="$found/" "$work/corpus/$target" "$corpus"
    fi
done
