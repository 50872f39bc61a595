#!/usr/bin/env bash
# Run the commands and programs that README.md and docs/ show; sets up first. What is run in their
# place on a machine without a GPU, and what is not run and why, is in scripts/check_docs.py.
#
#   scripts/check_docs.sh                 all of it, some minutes on two cores
#   scripts/check_docs.sh --only PART     blocks that have this text, or are under such a heading
#   scripts/check_docs.sh --compare       only whether check_docs.py knows every block
#
# Where FORGE_LIBRARY is set, that library and megatron_patch are used in place of the wheel, and
# nothing is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n ${FORGE_LIBRARY-} ]] || scripts/setup.sh --dev
exec .venv/bin/python scripts/check_docs.py "$@"
