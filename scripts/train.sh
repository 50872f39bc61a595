#!/usr/bin/env bash
# Train a small GPT on real text with FORGE; sets up everything first. `scripts/train.sh --help`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
cd "$root"
exec .venv/bin/python -m forge_train.demo "$@"
