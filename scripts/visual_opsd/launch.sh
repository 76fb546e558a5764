# shellcheck shell=bash
# What the run_*.sh launchers share; sourced, never run. It moves to the repository's root, so
# that the launchers work from any directory, and offers
#
#   parse_arguments MAX "$@"      fills POSITIONAL (at most MAX) and FLAGS (from the first --flag)
#   add_positional FLAG...        adds --FLAG to ARGUMENTS for each positional that was given,
#   add_environment NAME=FLAG...  for each variable that is set,
#   add_output NAME               and where a training run writes
#   launch MODULE ARGUMENT...     replaces the shell by torchrun on MODULE
#
# What is not given is not passed on: defaults stand in the Python programs alone, and a --config
# file among the flags is not overridden.
#
# A launcher defines usage() before it calls them.

CALLER_DIRECTORY=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit 1

common_usage() {
    cat <<TEXT
In brackets: the program's own defaults, which are the paper's. Everything from the first argument
that starts with -- goes to the program as it is; its own --help lists all flags. With a --config
file among them that changes what the name of the results says, give that name yourself.
A relative MODEL_PATH is looked up where you stand, then, like every other relative path, at the
root of the repository.

Where it runs: one process per GPU of this machine, or one on the CPU. With ARNOLD_WORKER_NUM,
ARNOLD_WORKER_GPU, ARNOLD_WORKER_0_HOST, ARNOLD_WORKER_0_PORT and ARNOLD_ID, or inside srun of a
SLURM job with several nodes, it joins the other nodes; start it once on each.

  NPROC_PER_NODE     processes on this machine, instead of one per GPU
  MASTER_PORT        port of the first node (SLURM)
  SHUTDOWN_TIMEOUT   seconds that a stopped run has to save its state (default 600; torch >= 2.12,
                     earlier versions always give 30)
  PYTHON             interpreter (default: .venv/bin/python of the repository, else python3)
  DRY_RUN=1          print the command instead of running it
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 2
}

parse_arguments() {
    local most=$1
    shift
    POSITIONAL=()
    FLAGS=()
    ARGUMENTS=()
    case ${1:-} in
        -h | --help)
            usage
            exit 0
            ;;
    esac
    while (($# > 0)); do
        case $1 in
            --*)
                FLAGS=("$@")
                break
                ;;
            -*) fail "unknown option $1; flags of the Python program start with --, -h shows the usage." ;;
            *) POSITIONAL+=("$1") ;;
        esac
        shift
    done
    if ((${#POSITIONAL[@]} > most)); then
        fail "${#POSITIONAL[@]} positional arguments, at most $most are understood; -h shows the usage."
    fi
}

# add_positional FLAG...: the Nth FLAG belongs to the Nth positional argument, - to none.
add_positional() {
    local number=0 value
    for value in ${POSITIONAL[@]+"${POSITIONAL[@]}"}; do
        number=$((number + 1))
        if [[ -z $value || ${!number} == - ]]; then
            continue
        fi
        if [[ ${!number} == model_path && $value != /* && -e $CALLER_DIRECTORY/$value ]]; then
            value=$CALLER_DIRECTORY/$value
        fi
        ARGUMENTS+=("--${!number}" "$value")
    done
}

# add_output NAME: where a training run writes.
add_output() {
    ARGUMENTS+=(--results_dir "results/$1" --checkpoint_dir "results/$1/checkpoints")
}

# add_environment NAME=FLAG...
add_environment() {
    local pair name
    for pair in "$@"; do
        name=${pair%%=*}
        if [[ -n ${!name:-} ]]; then
            ARGUMENTS+=("--${pair#*=}" "${!name}")
        fi
    done
}

# Processes to start on this machine: one per visible GPU, one without any.
local_processes() {
    local count=0 device
    if [[ -n ${NPROC_PER_NODE:-} ]]; then
        count=$NPROC_PER_NODE
    elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        # CUDA ignores everything from the first invalid entry on; -1 hides all.
        for device in ${CUDA_VISIBLE_DEVICES//,/ }; do
            [[ $device == -* ]] && break
            count=$((count + 1))
        done
    elif command -v nvidia-smi >/dev/null; then
        count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    fi
    echo $((count > 0 ? count : 1))
}

# Fills RENDEZVOUS with torchrun's options from ARNOLD_* or SLURM_* variables.
find_cluster() {
    local nodes rank address port processes nodelist
    RENDEZVOUS=()
    if [[ -n ${ARNOLD_WORKER_NUM:-}${ARNOLD_WORKER_0_HOST:-} ]]; then
        nodes=${ARNOLD_WORKER_NUM:-1}
        rank=${ARNOLD_ID:-0}
        processes=${NPROC_PER_NODE:-${ARNOLD_WORKER_GPU:-$(local_processes)}}
        address=${ARNOLD_WORKER_0_HOST:-}
        port=${ARNOLD_WORKER_0_PORT:-29500}
        port=${port%%,*}
        if ((nodes > 1)); then
            [[ -n $address ]] || fail "ARNOLD_WORKER_NUM=$nodes, but ARNOLD_WORKER_0_HOST (the first node's address) is not set."
            [[ -n ${ARNOLD_ID:-} ]] || fail "ARNOLD_WORKER_NUM=$nodes, but ARNOLD_ID (this node's number from 0) is not set."
        fi
    else
        # A step of srun may cover fewer nodes than the job.
        nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
        nodelist=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}
        rank=${SLURM_NODEID:-0}
        processes=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(local_processes)}}
        [[ ${SLURM_LOCALID:-0} == 0 ]] || fail "several tasks on one node; start one a node, torchrun starts the processes: srun --ntasks-per-node=1"
        address=""
        if ((nodes > 1)); then
            command -v scontrol >/dev/null || fail "a SLURM job on $nodes nodes, but scontrol (which names the first) is not on PATH."
            address=$(scontrol show hostnames "$nodelist" | head -n 1)
            [[ -n $address ]] || fail "scontrol names no host for the nodes '$nodelist'."
            if [[ -z ${SLURM_STEP_ID:-} ]]; then
                echo "warning: not inside srun; torchrun waits until all $nodes nodes have started this." >&2
            fi
        fi
        # Jobs that share a node must not share a port.
        port=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
    fi
    if [[ -z $address ]]; then
        RENDEZVOUS=(--standalone --nproc_per_node="$processes")
    else
        RENDEZVOUS=(--nnodes="$nodes" --node_rank="$rank" --nproc_per_node="$processes"
            --master_addr="$address" --master_port="$port")
    fi
}

launch() {
    local python=${PYTHON:-}
    if [[ -z $python ]]; then
        python=python3
        [[ -x .venv/bin/python ]] && python=$PWD/.venv/bin/python
    elif [[ $python == */* && $python != /* ]]; then
        python=$CALLER_DIRECTORY/$python
    fi
    if [[ ${VISUAL_OPSD_DATA_ROOT:-/} != /* && -e $CALLER_DIRECTORY/$VISUAL_OPSD_DATA_ROOT ]]; then
        export VISUAL_OPSD_DATA_ROOT=$CALLER_DIRECTORY/$VISUAL_OPSD_DATA_ROOT
    fi
    find_cluster

    # Completions of every length fragment the allocator; a rollout may keep NCCL quiet for minutes.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-1800}
    # The variable of torchrun's --shutdown-timeout; versions without the option ignore it.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}}

    local command=("$python" -m torch.distributed.run "${RENDEZVOUS[@]}" -m "$@")
    if [[ -n ${DRY_RUN:-} && ${DRY_RUN} != 0 ]]; then
        printf 'cd %q && env' "$PWD"
        printf ' %q' "PYTORCH_CUDA_ALLOC_CONF=$PYTORCH_CUDA_ALLOC_CONF" \
            "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=$TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC" \
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "${command[@]}"
        printf '\n'
        return
    fi
    # exec: a SIGTERM for the launcher must reach torchrun, which passes it on.
    exec "${command[@]}"
}

# Visual-OPSD itself, for the two launchers that differ in the visual thoughts only:
#   launch_opsd NAME_PREFIX [CONDITION_FLAG...] :: "$@"
launch_opsd() {
    local prefix=$1 condition=()
    shift
    while [[ $1 != :: ]]; do
        condition+=("$1")
        shift
    done
    shift
    parse_arguments 7 "$@"
    add_positional model_path teacher_mode jsd_beta jsd_temperature jsd_weight total_steps -
    add_environment EMA_DECAY=ema_decay JSD_TOP_K=jsd_top_k JSD_TOKEN_CLIP=jsd_token_clip \
        CE_WEIGHT=ce_weight SAMPLE_MAX_NEW=sample_max_new_tokens SAMPLE_TEMP=sample_temperature \
        MAX_FORWARD_TOKENS=max_forward_tokens SAMPLE_MAX_IMAGE_SKIPS=sample_max_image_skips
    local name=$prefix-${POSITIONAL[1]:-ema}-beta${POSITIONAL[2]:-0.5}
    add_output "${POSITIONAL[6]:-$name}"
    launch scripts.visual_opsd.train_visual_opsd "${ARGUMENTS[@]}" \
        ${condition[@]+"${condition[@]}"} ${FLAGS[@]+"${FLAGS[@]}"}
}

opsd_arguments() {
    cat <<TEXT
  MODEL_PATH    release folder that student and teacher start from (models/ThinkMorph-7B)
  TEACHER_MODE  ema, fixed or self (ema)
  JSD_BETA      weight of the teacher in the mixture of the generalised JSD (0.5)
  JSD_TEMP      temperature of both distributions in the loss (1.0)
  JSD_WEIGHT    weight of the JSD (1.0)
  TOTAL_STEPS   optimiser steps (1000, as the paper trains; the authors' script says 2000)
TEXT
}

opsd_variables() {
    cat <<TEXT
Environment:
  EMA_DECAY               decay of the EMA teacher (0.995)
  JSD_TOP_K               vocabulary entries of the teacher in the loss, 0 for all (256)
  JSD_TOKEN_CLIP          upper bound of each entry's term (0.05)
  CE_WEIGHT               weight of the cross-entropy on the completion (0)
  SAMPLE_MAX_NEW          longest completion, in tokens (1024)
  SAMPLE_TEMP             sampling temperature of the student (1.0)
  MAX_FORWARD_TOKENS      longest teacher sequence; completions are cut to fit (10240)
  SAMPLE_MAX_IMAGE_SKIPS  times the student may go on after it asked for an image (1)
TEXT
}
