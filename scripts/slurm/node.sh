#!/usr/bin/env bash
# One node's ranks under torchrun: node.sh MEGATRON_FLAGS... Run by launch.sh, inside the container if
# there is one. Exit status 2: this node cannot start at all.
set -uo pipefail
asked=""
agent=""
told=()

fail() {
    printf 'node %s (%s): %s\n' "$SLURM_NODEID" "${SLURMD_NODENAME:-$(uname -n)}" "$*" >&2
    exit 2
}

# SLURM's own word on preemption. On clusters that track by cgroup only this process gets it.
# shellcheck disable=SC2329 # a trap calls it
stop_all() {
    asked=1
    : >"$JOB_STOP_FILE"
}

# signal_ranks: SIGUSR1 for each rank that has a handler, once: before Megatron has set its own the signal
# would be lost, and while Python ends it would kill. Ranks are the agent's children. No pgrep: images
# may lack it.
signal_ranks() {
    local file key value pid parent caught
    for file in /proc/[0-9]*/status; do
        parent=""
        caught=0
        while read -r key value _; do
            case $key in
                PPid:)
                    parent=$value
                    [[ $parent == "$agent" ]] || break
                    ;;
                SigCgt:)
                    # A mask in hexadecimal; SIGUSR1 is 10, so bit 9.
                    caught=$((16#${value: -8} >> 9 & 1))
                    break
                    ;;
            esac
        done 2>/dev/null <"$file"
        pid=${file#/proc/}
        pid=${pid%/status}
        if [[ $parent == "$agent" && $caught == 1 && -z ${told[$pid]-} ]]; then
            kill -USR1 "$pid" 2>/dev/null
            told[pid]=1
        fi
    done
}

[[ -f $JOB_SCRIPT ]] || fail "JOB_SCRIPT=$JOB_SCRIPT is not on this node; it must be on a file system of all"
[[ -d $(dirname "$JOB_STOP_FILE") ]] || fail "JOB_RUN_DIR is not on this node; it must be on a file system of all"
"$JOB_PYTHON" - "$(dirname "$JOB_SCRIPT")" <<'PYTHON' || fail "see the line above; scripts/setup.sh installs both in JOB_VENV"
import importlib.util
import sys

sys.path.insert(0, sys.argv[1])
missing = [name for name in ("torch", "forge_train", "megatron") if importlib.util.find_spec(name) is None]
sys.exit(f"{sys.executable} has no {', '.join(missing)}" if missing else 0)
PYTHON

# Every rank's output goes to a file; the job's log gets rank 0, and the last, which prints the losses.
tee=()
((SLURM_NODEID > 0)) || tee+=("0:3")
if ((SLURM_NODEID == SLURM_NNODES - 1)) && ((SLURM_NNODES * JOB_RANKS_PER_NODE > 1)); then
    tee+=("$((JOB_RANKS_PER_NODE - 1)):3")
fi
shown=$(IFS=, && echo "${tee[*]-}")

trap stop_all USR1 TERM
(
    # Inherited: a signal that comes before Megatron has its handler does not end a rank.
    trap '' USR1
    # Static: ranks are in the order of SLURM's nodes, which is the network's.
    exec "$JOB_PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$JOB_RANKS_PER_NODE" \
        --master-addr "$JOB_MASTER_ADDR" --master-port "$JOB_MASTER_PORT" \
        --max-restarts 0 --log-dir "$JOB_LOG_DIR/node-$SLURM_NODEID" --redirects 3 --tee "${shown:-0}" \
        -m forge_train.megatron "$JOB_SCRIPT" "$@"
) &
agent=$!

# Node 0 looks for the file: it shares launch.sh's host, so that no file system's cache is in between.
# One rank that knows is enough: Megatron asks all of them after each step.
while kill -0 "$agent" 2>/dev/null; do
    if ((SLURM_NODEID == 0)) && [[ -e $JOB_STOP_FILE ]]; then asked=1; fi
    [[ -z $asked ]] || signal_ranks
    # In the background, since a trap waits for what is in the foreground.
    sleep 1 &
    wait $!
done
wait "$agent"
status=$?
# 2 is this script's own: a rank's failure is 1.
exit "$((status == 2 ? 1 : status))"
