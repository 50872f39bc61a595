#!/usr/bin/env bash
# Train stock Megatron and FORGE side by side from the same seed, and compare the losses of every
# step: at TP=1, TP=2 and TP=2 with sequence parallelism, with gradient clipping on and off, with 1
# and 4 micro-batches per step (12 runs in fp32), and once with bf16+16 weights against Megatron's
# bf16 weights with an fp32 master copy. Takes some 15 minutes on 2 cores, so test.sh leaves it out.
#
#   scripts/check_equal_losses.sh              25 steps per run
#   scripts/check_equal_losses.sh --steps N    another number
#
# The demo's learning rate and Adam epsilon are chosen so that this question has an answer: at 1e-3
# and 1e-8 the run is chaotic, and two stock runs part as well (see demo/config.py).
#
# Prints one row per run: the largest absolute difference of the two losses, in nats per byte, the
# step it is at, and FORGE's last loss. Exit status 1 if a run failed or an fp32 row exceeds 1e-4;
# the bf16 row is for information (there a loss is a mean over bf16 logits). On failure the runs are
# kept for inspection.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tolerance=1e-4
steps=25
case "${1-}" in
    "") ;;
    --steps) steps=${2:?--steps needs a number} ;;
    *)
        printf 'check_equal_losses: unknown argument: %s (only --steps N is known)\n' "$1" >&2
        exit 2
        ;;
esac

scripts/setup.sh
out=$(mktemp -d "${TMPDIR:-/tmp}/forge-equal-losses-XXXXXX")
printf '%-11s %-4s %-13s %-8s %-15s %-5s %-9s %s\n' \
    parallel clip micro-batches weights "max |difference|" step "last loss" verdict

# read_result DIRECTORY LIMIT: the measured half of a row; status 1 when above the limit.
read_result() {
    .venv/bin/python - "$1" "$2" <<'PYTHON'
import json
import sys
from pathlib import Path

directory, limit = Path(sys.argv[1]), float(sys.argv[2])
result = json.loads((directory / "compare.json").read_text())
last = json.loads((directory / "log.jsonl").read_text().splitlines()[-1])["loss"]
difference = result["max_abs_loss_difference"]
equal = difference <= limit  # False for NaN
verdict = "no limit" if limit == float("inf") else "equal" if equal else f"ABOVE {limit:g}"
print(f"{difference:<16.2e} {result['at_step']:<5} {last:<9.4f} {verdict}")
sys.exit(not equal)
PYTHON
}

number=0
failures=0
# compare PARALLEL CLIP MICRO-BATCHES WEIGHTS LIMIT: one pair of runs, one row.
compare() {
    local parallel=$1 clip=$2 micro_batches=$3 weights=$4 limit=$5 flags name
    case $parallel in
        TP=1) flags=(--tp 1) ;;
        TP=2) flags=(--tp 2 --no-sequence-parallel) ;;
        TP=2+SP) flags=(--tp 2) ;;
    esac
    number=$((number + 1))
    name=run-$number
    printf '%-11s %-4s %-13s %-8s ' "$parallel" "$clip" "$micro_batches" "$weights"
    if ! .venv/bin/python -m forge_train.demo --compare --out "$out" --name "$name" \
        --steps "$steps" --save-interval 0 --clip-grad "$clip" --micro-batches "$micro_batches" \
        --weight-format "$weights" "${flags[@]}" >"$out/$name.txt" 2>&1; then
        printf 'did not run: see %s\n' "$out/$name.txt"
        failures=$((failures + 1))
    elif ! read_result "$out/$name" "$limit"; then
        failures=$((failures + 1))
    fi
}

for parallel in TP=1 TP=2 TP=2+SP; do
    for clip in 1 0; do
        for micro_batches in 1 4; do
            compare "$parallel" "$clip" "$micro_batches" fp32 "$tolerance"
        done
    done
done
compare TP=2+SP 1 1 bf16+16 inf

if ((failures)); then
    printf '%d of %d runs failed in %d s; they are in %s\n' "$failures" "$number" "$SECONDS" "$out"
    exit 1
fi
rm -r "$out"
printf 'all %d runs as they should be, in %d s\n' "$number" "$SECONDS"
