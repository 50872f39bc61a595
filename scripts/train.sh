#!/usr/bin/env bash
# Train a small GPT on real text with FORGE; sets up everything first. `scripts/train.sh --help`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# The help needs no set-up: any Python reads it from the sources, past the package's own imports.
help='
import sys, types
package = sys.modules["forge_train"] = types.ModuleType("forge_train")
package.__path__ = ["megatron_patch/forge_train"]
from forge_train.demo.cli import main
main(["--help"])
'
for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]] && command -v python3 >/dev/null; then
        exec python3 -B -c "$help"
    fi
done

scripts/setup.sh
exec .venv/bin/python -m forge_train.demo "$@"
