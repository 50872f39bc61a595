# shellcheck shell=bash disable=SC2154 # launch.sh sets attempt, checkpoints and state
# Bad input ends a job before it holds nodes for long. Sourced by launch.sh.

# positive NAME: a whole number above 0.
positive() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1=${!1} is not a whole number above 0"; }

# one_of NAME VALUE...
one_of() {
    local name=$1 value
    shift
    for value in "$@"; do [[ ${!name} != "$value" ]] || return 0; done
    fail "$name=${!name} is unknown; use one of: $*"
}

check_variables() {
    local name ranks
    for name in JOB_SCRIPT JOB_MODEL JOB_RUN_DIR JOB_CACHE_DIR JOB_LOAD; do
        [[ -z ${!name} ]] || printf -v "$name" %s "$(realpath --canonicalize-missing --no-symlinks "${!name}")"
    done
    for name in JOB_TP JOB_PP JOB_SAVE_INTERVAL JOB_MAX_ATTEMPTS JOB_STOP_SECONDS JOB_RANKS_PER_NODE \
        JOB_COLLECTIVE_MINUTES JOB_IB_TIMEOUT; do
        positive "$name"
    done
    [[ -z $JOB_MASTER_PORT ]] || positive JOB_MASTER_PORT
    one_of JOB_DEVICE cuda cpu
    one_of JOB_CONTAINER_RUNTIME pyxis apptainer
    one_of JOB_WARM 0 1
    one_of JOB_CACHE_SHARED 0 1
    [[ -f $JOB_SCRIPT ]] ||
        fail "JOB_SCRIPT=$JOB_SCRIPT is no file; name pretrain_gpt.py in a checkout of Megatron-LM"
    [[ -f $JOB_MODEL ]] || fail "JOB_MODEL=$JOB_MODEL is no file; name a file of Megatron's flags"
    [[ -n $JOB_DATA ]] ||
        fail "JOB_DATA is empty; give Megatron's --data-path, or mock, or none for a script with data of its own"
    [[ $JOB_DATA == none || $JOB_DATA == mock || -n $JOB_TOKENIZER ]] ||
        fail "JOB_TOKENIZER is empty; name the tokenizer that JOB_DATA was made with"
    [[ -z $JOB_LOAD || -d $JOB_LOAD ]] || fail "JOB_LOAD=$JOB_LOAD is no directory"
    [[ -n $JOB_CONTAINER || -x $JOB_VENV/bin/python ]] ||
        fail "JOB_VENV=$JOB_VENV has no bin/python; run scripts/setup.sh, or name an image in JOB_CONTAINER"
    for name in JOB_ROOT JOB_SCRIPT JOB_RUN_DIR JOB_CACHE_DIR JOB_LOAD; do
        [[ ${!name} != *[[:space:],:]* ]] ||
            fail "$name=${!name} has a space, a comma or a colon, which part the mounts of containers; use another path"
    done
    ranks=$((SLURM_JOB_NUM_NODES * JOB_RANKS_PER_NODE))
    ((ranks % (JOB_TP * JOB_PP) == 0)) ||
        fail "$ranks ranks ($SLURM_JOB_NUM_NODES nodes, JOB_RANKS_PER_NODE=$JOB_RANKS_PER_NODE) are no multiple of JOB_TP=$JOB_TP times JOB_PP=$JOB_PP"
}

# read_flags FILE: its words, without comments, into the array `flags`.
read_flags() {
    local line words
    while IFS= read -r line || [[ -n $line ]]; do
        read -ra words <<<"${line%%#*}"
        flags+=("${words[@]}")
    done <"$1"
}

# check_flags: what this script decides must not be decided again.
check_flags() {
    local flag given
    read -ra given <<<"$JOB_FLAGS $JOB_FORGE_FLAGS"
    for flag in "${given[@]}"; do
        case ${flag%%=*} in
            --save | --save-interval) fail "$flag in JOB_FLAGS: use JOB_RUN_DIR and JOB_SAVE_INTERVAL" ;;
            --load | --ckpt-step) fail "$flag in JOB_FLAGS: use JOB_LOAD; a requeued job goes on from its own checkpoint" ;;
            --exit-signal | --exit-duration-in-mins | --exit-interval)
                fail "$flag in JOB_FLAGS: the job would count as finished when it is not; use sbatch --time and --signal"
                ;;
            --tensor-model-parallel-size) fail "$flag in JOB_FLAGS: use JOB_TP" ;;
            --pipeline-model-parallel-size) fail "$flag in JOB_FLAGS: use JOB_PP" ;;
        esac
    done
}

# claim_run: two jobs that save into one folder would destroy each other's checkpoints.
claim_run() {
    local owner
    owner=$(cat "$state/owner" 2>/dev/null)
    if [[ -n $owner && $owner != "$SLURM_JOB_ID" ]] &&
        [[ -n $(squeue --noheader --jobs="$owner" --states=RUNNING --format=%i 2>/dev/null) ]]; then
        fail "JOB_RUN_DIR=$JOB_RUN_DIR is in use by job $owner; wait for it, or name another folder"
    fi
    printf '%s\n' "$SLURM_JOB_ID" >"$state/owner"
}
