# shellcheck shell=bash
# One start of a job: checks, warm-up, ranks, and what happens when they end. Sourced by the sbatch
# scripts, which have set JOB_ROOT. Runs on the job's first node, outside of any container.
set -uo pipefail
here=$JOB_ROOT/scripts/slurm

say() { printf 'forge job %s: %s\n' "${SLURM_JOB_ID:-?}" "$*"; }

# fail MESSAGE: for what a requeue would not mend.
fail() {
    say "$*" >&2
    exit 2
}

# shellcheck source=scripts/slurm/site.sh
source "$here/site.sh"
# shellcheck source=scripts/slurm/checks.sh
source "$here/checks.sh"
# shellcheck source=scripts/slurm/checkpoints.sh
source "$here/checkpoints.sh"

attempt=${SLURM_RESTART_COUNT:-0}
checkpoints=$JOB_RUN_DIR/checkpoints
state=$JOB_RUN_DIR/state
export JOB_LOG_DIR=$JOB_RUN_DIR/logs/$SLURM_JOB_ID.$attempt
# Its presence asks the ranks to save and to end. A file, since what of a step gets a signal depends
# on the cluster's process tracking and on the container.
export JOB_STOP_FILE=$state/$SLURM_JOB_ID.$attempt.stop
cancelled=
interrupted=
# Until there is something to save.
trap '' USR1

# flags_of_job: Megatron's flags, in the array `flags`.
flags_of_job() {
    local own sequence_parallel=()
    if ((JOB_TP > 1)); then
        sequence_parallel=(--sequence-parallel --spec forge_train.megatron.spec layer_spec)
    fi
    read_flags "$JOB_MODEL"
    flags+=(--tensor-model-parallel-size "$JOB_TP" --pipeline-model-parallel-size "$JOB_PP"
        "${sequence_parallel[@]}" --distributed-timeout-minutes "$JOB_COLLECTIVE_MINUTES")
    case $JOB_DATA in
        none) ;;
        mock) flags+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 128256) ;;
        *)
            read -ra own <<<"$JOB_DATA"
            flags+=(--data-path "${own[@]}" --tokenizer-type HuggingFaceTokenizer
                --tokenizer-model "$JOB_TOKENIZER")
            ;;
    esac
    if [[ $JOB_DEVICE == cpu ]]; then
        flags+=(--distributed-backend gloo --use-cpu-initialization)
    fi
    # Megatron's handler saves and ends between two steps, whichever rank got the signal.
    flags+=(--ckpt-format torch_dist --save "$checkpoints" --save-interval "$JOB_SAVE_INTERVAL"
        --exit-signal-handler --exit-signal SIGUSR1)
    if [[ -f $checkpoints/$tracker_name ]]; then
        flags+=(--load "$checkpoints" --exit-on-missing-checkpoint)
    elif [[ -n $JOB_LOAD ]]; then
        flags+=(--load "$JOB_LOAD" --exit-on-missing-checkpoint)
    fi
    read -ra own <<<"$JOB_FORGE_FLAGS"
    flags+=("${own[@]}")
    read -ra own <<<"$JOB_FLAGS"
    flags+=("${own[@]}")
}

# environment: of the ranks, through srun.
environment() {
    local base=$((20000 + SLURM_JOB_ID % 10000))
    export JOB_ROOT JOB_SCRIPT JOB_RANKS_PER_NODE JOB_WARM_ARCH
    export JOB_MASTER_PORT=${JOB_MASTER_PORT:-$base}
    export JOB_MASTER_ADDR=${JOB_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export JOB_PYTHON=$JOB_VENV/bin/python
    [[ -z $JOB_CONTAINER ]] || JOB_PYTHON=$JOB_CONTAINER_PYTHON
    export FORGE_CACHE_DIR=$JOB_CACHE_DIR
    [[ $JOB_CACHE_SHARED == 0 ]] || mkdir -p "$JOB_CACHE_DIR" || fail "JOB_CACHE_DIR=$JOB_CACHE_DIR cannot be made"
    # Megatron asks for it with tensor parallelism before Blackwell: launch order is execution order.
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export PYTHONUNBUFFERED=1
    if [[ $JOB_DEVICE == cpu ]]; then
        export FORGE_MEGATRON_CPU=1 TORCHDYNAMO_DISABLE=1
    fi
    if [[ -n $JOB_INTERFACE ]]; then
        export NCCL_SOCKET_IFNAME=$JOB_INTERFACE
        # gloo, which checkpoints use, takes one plain name only.
        [[ $JOB_INTERFACE == *[=^,]* ]] || export GLOO_SOCKET_IFNAME=$JOB_INTERFACE
    fi
    [[ -z $JOB_IB_HCAS ]] || export NCCL_IB_HCA=$JOB_IB_HCAS
    export NCCL_IB_TIMEOUT=$JOB_IB_TIMEOUT NCCL_DEBUG=$JOB_NCCL_DEBUG
}

# step_of NODES SRUN_FLAGS... -- COMMAND...: the command, once a node and in the job's container if it
# has one, as the array `step`.
step_of() {
    local more folder mounts=$JOB_CONTAINER_MOUNTS
    step=(srun "--nodes=$1" "--ntasks=$1" --ntasks-per-node=1 --cpu-bind=none)
    shift
    for folder in "$JOB_ROOT" "$JOB_RUN_DIR" "$JOB_CACHE_DIR" "$(dirname "$JOB_SCRIPT")" $JOB_LOAD; do
        mounts+=${mounts:+,}$folder:$folder
    done
    # srun does not take sbatch's word for it any more.
    [[ -z ${SLURM_CPUS_PER_TASK-} ]] || step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    read -ra more <<<"$JOB_SRUN_FLAGS"
    step+=("${more[@]}")
    while [[ $1 != -- ]]; do
        step+=("$1")
        shift
    done
    shift
    if [[ -n $JOB_CONTAINER && $JOB_CONTAINER_RUNTIME == pyxis ]]; then
        step+=("--container-image=$JOB_CONTAINER" "--container-mounts=$mounts")
    elif [[ -n $JOB_CONTAINER ]]; then
        step+=(apptainer exec --nv --bind "$mounts" "$JOB_CONTAINER")
    fi
    step+=("$@")
}

warm_up() {
    local nodes=$SLURM_JOB_NUM_NODES begin=$SECONDS
    if [[ $JOB_DEVICE == cpu ]]; then
        say "no kernels to compile: the job runs on CPUs"
        return
    elif [[ $JOB_WARM == 0 || -z $JOB_FORGE_FLAGS ]]; then
        say "kernels are not compiled ahead of time"
        return
    fi
    # One for all, or a thousand ranks would compile the same kernels at once.
    [[ $JOB_CACHE_SHARED == 0 ]] || nodes=1
    step_of "$nodes" -- "$JOB_PYTHON" "$here/warm.py" \
        --ranks "$((SLURM_JOB_NUM_NODES * JOB_RANKS_PER_NODE))" "${flags[@]}"
    if "${step[@]}"; then
        say "kernels are in $JOB_CACHE_DIR after $((SECONDS - begin)) s"
    else
        say "kernels were not compiled ahead of time (above is why); ranks compile what they need"
    fi
}

# requeue WHY: put the job back, unless it does not get anywhere or is not ours to put back.
requeue() {
    local now job_state
    settle_tracker "$checkpoints" || exit 1
    now=$(latest_iteration)
    if ((now <= started_from && fruitless >= JOB_MAX_ATTEMPTS)); then
        say "$1; not requeued: $fruitless starts in a row ended without a checkpoint newer than iteration $now (JOB_MAX_ATTEMPTS=$JOB_MAX_ATTEMPTS). The ranks' own words are in $JOB_LOG_DIR" >&2
        exit 1
    fi
    # Someone's scancel is final, and SLURM requeues what it preempts.
    job_state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ -n $cancelled || $job_state != RUNNING ]]; then
        say "$1; not requeued: the job is ${job_state:-gone}${cancelled:+, and was told to end}" >&2
        exit 1
    fi
    say "$1; requeued, to go on from iteration $now"
    scontrol requeue "$SLURM_JOB_ID" || fail "scontrol requeue failed: submit the job again to go on"
    # SLURM ends this process now.
    exec sleep 60
}

ask_to_stop() {
    interrupted=1
    [[ ! -e $JOB_STOP_FILE ]] || return 0
    say "told to stop: the ranks save after this step"
    : >"$JOB_STOP_FILE"
    [[ -z $ranks ]] || limit_stop
}

# limit_stop: ranks that hang must not take the job past its time limit, for then it would not be requeued.
limit_stop() {
    (
        sleep "$JOB_STOP_SECONDS"
        say "the ranks did not stop within $JOB_STOP_SECONDS s (JOB_STOP_SECONDS)"
        # srun's cue to end its step, in the end by SIGKILL.
        kill -TERM "$ranks"
    ) &
    watchdog=$!
}

was_cancelled() {
    interrupted=1
    cancelled=1
}

run_ranks() {
    local status
    step_of "$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 --label -- bash "$here/node.sh" "${flags[@]}"
    "${step[@]}" &
    ranks=$!
    # It may have come just before.
    [[ ! -e $JOB_STOP_FILE || -n $watchdog ]] || limit_stop
    # A signal ends the wait, not the ranks.
    while :; do
        interrupted=
        status=0
        wait "$ranks" || status=$?
        [[ -n $interrupted ]] || break
    done
    return "$status"
}

main() {
    local status=0 flags=() step=() ranks="" watchdog=""
    check_variables
    mkdir -p "$checkpoints" "$JOB_LOG_DIR" "$state" ||
        fail "JOB_RUN_DIR=$JOB_RUN_DIR cannot be written; name a folder that all nodes share"
    claim_run
    settle_tracker "$checkpoints" || exit 2
    count_attempt
    environment
    flags_of_job
    check_flags
    say "start $attempt on $SLURM_JOB_NODELIST from iteration $started_from; logs of the ranks in $JOB_LOG_DIR"
    trap ask_to_stop USR1
    trap was_cancelled TERM
    warm_up
    [[ ! -e $JOB_STOP_FILE ]] || requeue "told to stop before the ranks began"
    run_ranks || status=$?
    trap '' USR1
    [[ -z $watchdog ]] || kill "$watchdog" 2>/dev/null
    if ((status == 2)); then
        fail "a node refused to start (above is why)"
    elif ((status != 0)); then
        requeue "the ranks failed with status $status"
    elif [[ -e $JOB_STOP_FILE ]]; then
        requeue "the ranks stopped as told"
    fi
    say "finished at iteration $(latest_iteration)"
}
