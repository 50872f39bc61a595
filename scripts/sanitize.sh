#!/usr/bin/env bash
# The C programs and the fuzzers' corpora under AddressSanitizer, with its search for leaks:
# `scripts/sanitize.sh --help`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"

usage() {
    cat <<'USAGE'
usage: scripts/sanitize.sh [address | fuzz] ...

  address  tests/c against a libforge.a with AddressSanitizer and LeakSanitizer
  fuzz     the committed corpora under AddressSanitizer, and 10 seconds of each fuzzer

Default: address fuzz. Stable Rust is enough: RUSTC_BOOTSTRAP lets it take -Zsanitizer.
USAGE
}

host=$(rustc -vV | sed -n 's/^host: //p')
runtime=$(rustc --print sysroot)/lib/rustlib/$host/lib
target=${CARGO_TARGET_DIR:-$root/target}
libraries=(-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc)

# libforge.a with its code, and that of its dependencies, checked.
library() {
    # Without LTO: this build is made to be checked, not to be fast.
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$target/address \
        CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        cargo build --quiet --release --locked --lib --target "$host" \
        --manifest-path "$root/Cargo.toml"
}

# program SOURCE: compiles it with the compiler's own checks and links rustc's runtime, which the
# static library was built for; the compiler's would be a second one. Then runs it.
program() {
    local source=$1 compile=(cc -std=c99)
    [[ $source != *.cpp ]] || compile=(c++ -std=c++17)
    local out=$target/address/programs/${source##*/}
    mkdir -p "${out%/*}"
    "${compile[@]}" -g -O1 -pthread -fsanitize=address -I "$root/include" -I "$root/tests/c" \
        -c "$source" -o "$out.o"
    c++ "$out.o" "$target/address/$host/release/libforge.a" \
        -Wl,--whole-archive "$runtime"/librustc-*_rt.asan.a -Wl,--no-whole-archive \
        "${libraries[@]}" -o "$out.out"
    printf 'sanitize: %s\n' "${source##*/}"
    "$out.out" >"$out.txt" 2>&1 || {
        cat "$out.txt"
        printf 'sanitize: %s failed\n' "$source" >&2
        exit 1
    }
}

# A checker that finds nothing where there is something would pass everything.
check_the_checker() {
    local source=$target/address/programs/overrun.c out=$target/address/programs/overrun.c.txt
    mkdir -p "${source%/*}"
    cat >"$source" <<'C'
#include "small_net.h"
/* Says of an array that it is larger than it is: an overrun in the library, not in this program. */
int main(void) {
    net *n = malloc(sizeof *n);
    float *image = malloc(sizeof(float) * NET_OUT * NET_IN - 1);
    forge_parameter parameter;
    forge_buffer fp32;
    memset(&parameter, 0, sizeof parameter);
    parameter.struct_size = sizeof parameter;
    net_init(n, 1);
    net_buffer(&parameter.weight, n->weight, sizeof n->weight);
    for (int k = 0; k < 2; k++) {
        net_buffer(&parameter.states[k], n->moments[k], sizeof n->moments[k]);
        net_buffer(&parameter.scales[k], n->scales[k], sizeof n->scales[k]);
    }
    net_buffer(&fp32, image, sizeof(float) * NET_OUT * NET_IN);
    return (int)forge_linear_export_weight(net_linear(cpu_context(1)), &parameter, fp32, NULL);
}
C
    if (program "$source") >/dev/null 2>&1 || ! grep -q heap-buffer-overflow "$out"; then
        printf 'sanitize: an overrun of the library was not found\n' >&2
        exit 1
    fi
}

parts=("$@")
((${#parts[@]})) || parts=(address fuzz)
for part in "${parts[@]}"; do
    begin=$SECONDS
    case $part in
        address)
            library
            check_the_checker
            for source in "$root"/tests/c/*.c "$root"/tests/c/*.cpp; do
                # unload.c opens the shared library, which has no runtime in it.
                [[ ${source##*/} == unload.c ]] || program "$source"
            done
            ;;
        fuzz)
            "$root/scripts/fuzz.sh" --build
            for fuzzer in c_abi state_import; do
                seeds=$root/fuzz/corpus/$fuzzer
                program=$target/fuzz/$host/release/$fuzzer
                log=$target/fuzz/$fuzzer.log
                if ! { "$program" -runs=0 -detect_leaks=0 "$seeds" &&
                    "$program" -max_total_time=10 -max_len=512 -detect_leaks=0 \
                        -artifact_prefix="$target/fuzz/" "$(mktemp -d)" "$seeds"; } >"$log" 2>&1; then
                    tail -n 60 "$log"
                    printf 'sanitize: %s found something; the input is in %s\n' "$fuzzer" "$target/fuzz" >&2
                    exit 1
                fi
                tail -n 1 "$log"
            done
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
    printf 'sanitize: %s: %d s\n' "$part" "$((SECONDS - begin))"
done
