# shellcheck shell=bash
# What differs between clusters and runs: each variable, with its default. Sourced by launch.sh.
# A value in the environment of sbatch wins; or edit the defaults here.

# --- what is trained ---------------------------------------------------------------------------
: "${JOB_SCRIPT:=}"      # pretrain_gpt.py in a checkout of Megatron-LM; must be given
: "${JOB_DATA:=}"        # Megatron's --data-path; "mock"; "none" for a script with data of its own
: "${JOB_TOKENIZER:=}"   # directory or name of a Hugging Face tokenizer; not for mock and none
: "${JOB_MODEL:=$JOB_ROOT/scripts/slurm/llama3_8b.flags}" # file of Megatron's flags
: "${JOB_TP:=2}"         # tensor parallelism; above 1 with sequence parallelism
: "${JOB_PP:=1}"         # pipeline parallelism; data parallelism is what is left
: "${JOB_FLAGS:=}"       # more of Megatron's flags; they win over the file's
: "${JOB_FORGE_FLAGS=--forge}" # FORGE's flags; set but empty: the stock job
: "${JOB_RUN_DIR:=${SLURM_SUBMIT_DIR:-$PWD}/runs/${SLURM_JOB_NAME:-job}}" # on a file system of all nodes

# --- checkpoints and requeues ------------------------------------------------------------------
: "${JOB_LOAD:=}"            # checkpoint directory to begin from while the run has none of its own
: "${JOB_SAVE_INTERVAL:=500}" # steps
: "${JOB_MAX_ATTEMPTS:=3}"   # starts in a row that may end without a newer checkpoint
: "${JOB_STOP_SECONDS:=240}" # from SIGUSR1 to a requeue without a checkpoint; under --signal's time

# --- the nodes ---------------------------------------------------------------------------------
: "${JOB_DEVICE:=cuda}"      # or cpu: gloo, for tests
: "${JOB_RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-8}}"
: "${JOB_VENV:=$JOB_ROOT/.venv}"   # with forge_train and megatron-core; on all nodes
: "${JOB_CONTAINER:=}"             # an image; then JOB_VENV is not used
: "${JOB_CONTAINER_RUNTIME:=pyxis}" # or apptainer
: "${JOB_CONTAINER_PYTHON:=python}" # in the image
: "${JOB_CONTAINER_MOUNTS:=}"      # more folders, as A:B,C:D; data and tokenizer, say
: "${JOB_SRUN_FLAGS:=}"            # such as --mpi=none
: "${JOB_MASTER_ADDR:=}"           # default: the first node's name
: "${JOB_MASTER_PORT:=}"           # default: from the job's number, 20000 to 29999

# --- kernels -----------------------------------------------------------------------------------
: "${JOB_WARM:=1}"           # 0: ranks compile what they need themselves
: "${JOB_WARM_ARCH:=}"       # of the GPUs, such as sm_90a; default: asked of the first node's
: "${JOB_CACHE_DIR:=${FORGE_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/forge}}"
: "${JOB_CACHE_SHARED:=1}"   # 0: it is on the nodes' own disks, so each node compiles

# --- NCCL --------------------------------------------------------------------------------------
# The interface of the bootstrap and of gloo. Without one NCCL takes the first that looks right, which
# is wrong where nodes have a management network: "ib0", "=eth0", "^lo,docker".
: "${JOB_INTERFACE:=}"
# The InfiniBand ports to use: "mlx5" for all, or those beside GPUs: "=mlx5_0,mlx5_1,...". Without it
# NCCL takes every active port, storage's too.
: "${JOB_IB_HCAS:=}"
# 4.096 us * 2^22 = 17 s per retransmission, of which there are 7: a flapping link or a switch that
# restarts is outlasted. NCCL's own 20 gives up after some 30 s in all.
: "${JOB_IB_TIMEOUT:=22}"
# After so long without progress in a collective a rank gives up and the job is requeued. Longer than
# the slowest save, shorter than a person would wait.
: "${JOB_COLLECTIVE_MINUTES:=10}"
: "${JOB_NCCL_DEBUG:=WARN}"  # INFO prints which interface, ports and rings were taken
