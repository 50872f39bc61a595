#!/usr/bin/env bash
# Prepare .venv in the repository root: Python packages, and the forge_train wheel built from here.
# Does nothing when nothing has changed since the last time.
#
#   scripts/setup.sh         what training needs
#   scripts/setup.sh --dev   what the tests need as well
#
# PYTHON=/path/to/python chooses the interpreter that .venv is created with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

requirements=(scripts/requirements.txt)
case "${1-}" in
    "") ;;
    --dev) requirements+=(scripts/requirements-dev.txt) ;;
    *) fail "unknown argument: $1 (only --dev is known)" ;;
esac

# usable PYTHON MINOR: whether it runs, is Python 3.MINOR and can create virtual environments.
usable() {
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, $2))" 2>/dev/null
}

# 3.12 first: megatron-core's wheels are built for it. Before 3.12 there is only its older version.
find_python() {
    local minor candidate
    for minor in 12 13 11 10; do
        for candidate in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor."*/bin/python python3; do
            if usable "$candidate" "$minor"; then
                printf '%s\n' "$candidate"
                return
            fi
        done
    done
    return 1
}

hash_of() {
    # Names and contents, in a fixed order; whichever of the two tools the system has.
    local sum=(sha256sum)
    command -v sha256sum >/dev/null || sum=(shasum -a 256)
    find "$@" -type f ! -name '*.pyc' -print0 2>/dev/null | LC_ALL=C sort -z |
        xargs -0 "${sum[@]}" | "${sum[@]}" | cut -d' ' -f1
}

command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"
command -v cargo >/dev/null ||
    fail "cargo is missing: FORGE's core is written in Rust; install it from https://rustup.rs"
command -v cc >/dev/null ||
    fail "cc is missing: Rust links with the system's C compiler; install gcc or clang"

if [[ ! -x .venv/bin/python ]]; then
    python=${PYTHON:-$(find_python)} ||
        fail "no usable Python: 3.12 is best (3.13, 3.11 and 3.10 work), with its venv module; set PYTHON=/path/to/python if it is in an unusual place"
    echo "setup: creating .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

for file in "${requirements[@]}"; do
    stamp=.venv/.stamp-$(basename "$file")
    wanted=$(hash_of "$file")
    if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
        echo "setup: installing $file (torch alone is a download of some 2.8 GB on Linux)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$file"
        printf '%s\n' "$wanted" >"$stamp"
    fi
done

# Beside the environment: tests put it in front of the newer one.
older=scripts/requirements-older.txt
if [[ ${1-} == --dev && $(cat .venv/older/.stamp 2>/dev/null) != "$(hash_of "$older")" ]]; then
    echo "setup: installing $older"
    rm -rf .venv/older
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/older --requirement "$older"
    # A package of its own: without this Python looks for what it lacks in the newer one.
    touch .venv/older/megatron/__init__.py
    hash_of "$older" >.venv/older/.stamp
fi

# Everything that goes into the wheel. Cargo.lock and kernels may be missing: find skips them.
wanted=$(hash_of Cargo.toml Cargo.lock build.rs cbindgen.toml pyproject.toml include kernels src megatron_patch || true)
if [[ $(cat .venv/.stamp-wheel 2>/dev/null) != "$wanted" ]]; then
    echo "setup: building the forge_train wheel"
    rm -rf .venv/wheel
    CARGO_TERM_QUIET=true .venv/bin/maturin build --quiet --release --interpreter .venv/bin/python --out .venv/wheel
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
        .venv/wheel/*.whl
    printf '%s\n' "$wanted" >.venv/.stamp-wheel
fi
