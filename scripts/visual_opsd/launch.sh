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

Where it runs: one process per GPU of this machine (CUDA or HIP), or one on the CPU. Start it once
on each node; it joins the others

  in a pod   by MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK, which count nodes here (PyTorchJob),
             or by torchrun's own PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR,
             PET_MASTER_PORT, PET_RDZV_BACKEND, PET_RDZV_ENDPOINT and PET_RDZV_ID;
  in SLURM   inside srun, one task a node;
  elsewhere  by ARNOLD_WORKER_NUM, ARNOLD_WORKER_GPU, ARNOLD_WORKER_0_HOST, ARNOLD_WORKER_0_PORT
             and ARNOLD_ID, or by those above.

Where two of them differ, or only a part is set, nothing starts and the message names them.

  NPROC_PER_NODE     processes on this machine, instead of one per GPU
  MASTER_PORT        port of the first node (default: in SLURM by the job's number, else 29500)
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
    local count='' seen name device
    for name in CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES; do
        [[ -n ${!name+set} ]] || continue
        seen=0
        # CUDA ignores everything from the first invalid entry on; -1 hides all.
        for device in ${!name//,/ }; do
            [[ $device == -* ]] && break
            seen=$((seen + 1))
        done
        # Each of them can only hide devices from the others.
        ((seen < ${count:-99999})) && count=$seen
    done
    if [[ -z $count ]]; then
        count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
        # rocm-smi prints several lines for each GPU.
        ((count > 0)) || count=$(rocm-smi --showid 2>/dev/null | grep -o '^GPU\[[0-9]*\]' | sort -u | grep -c . || true)
    fi
    echo $((count > 0 ? count : 1))
}

# find_setting NAME...: fills FOUND and FOUND_NAME from the first that is set; the others must agree.
find_setting() {
    local name
    FOUND='' FOUND_NAME=''
    for name in "$@"; do
        if [[ -z ${!name:-} ]]; then
            continue
        elif [[ -z $FOUND ]]; then
            FOUND=${!name} FOUND_NAME=$name
        elif [[ ${!name} != "$FOUND" ]]; then
            fail "$FOUND_NAME=$FOUND contradicts $name=${!name}; unset what is left over."
        fi
    done
}

# check_number NAME VALUE LEAST MOST
check_number() {
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        fail "$1=$2 is not a whole number from $3 to $4."
    fi
}

is_this_machine() {
    [[ $1 == localhost || $1 == 127.* || $1 == ::1 || $1 == 0.0.0.0 ]]
}

# Fills RENDEZVOUS with torchrun's options from the variables of a cluster: ARNOLD_*; PET_*, which
# torchrun would read by itself (passed on so that one command line shows all); MASTER_ADDR,
# MASTER_PORT, WORLD_SIZE and RANK of a pod, which count nodes here; SLURM_*.
find_cluster() {
    local name nodes from processes rank address
    [[ -z ${LOCAL_RANK:-} ]] || fail "LOCAL_RANK=$LOCAL_RANK is set: started once a process (inside torchrun?); start it once a node, torchrun starts the processes (if it is left over, unset it)."
    [[ ${SLURM_LOCALID:-0} == 0 ]] || fail "several tasks on one node; start one a node, torchrun starts the processes: srun --ntasks-per-node=1"

    for name in NPROC_PER_NODE ARNOLD_WORKER_GPU PET_NPROC_PER_NODE SLURM_GPUS_ON_NODE; do
        processes=${!name:-}
        [[ -z $processes ]] || break
    done
    case $processes in
        '' | 0 | auto) processes=$(local_processes) ;; # torchrun's auto: one per core without GPUs
        gpu | cpu) ;;
        *) check_number "$name" "$processes" 1 4096 ;;
    esac

    # A step of srun may cover fewer nodes than the job. (Local names: the program sees its own.)
    local SLURM_NNODES=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-}}
    local PET_NNODES=${PET_NNODES:-} ARNOLD_WORKER_0_PORT=${ARNOLD_WORKER_0_PORT:-}
    [[ ${PET_NNODES%:*} == "${PET_NNODES#*:}" ]] && PET_NNODES=${PET_NNODES%:*}
    ARNOLD_WORKER_0_PORT=${ARNOLD_WORKER_0_PORT%%,*}
    find_setting ARNOLD_WORKER_NUM PET_NNODES NNODES SLURM_NNODES
    [[ -n $FOUND ]] || find_setting WORLD_SIZE
    nodes=$FOUND from="$FOUND_NAME=$FOUND"
    if [[ -z $nodes ]]; then
        for name in ARNOLD_ID PET_NODE_RANK NODE_RANK RANK ARNOLD_WORKER_0_HOST PET_MASTER_ADDR \
            PET_RDZV_ENDPOINT MASTER_ADDR; do
            [[ -z ${!name:-} ]] || is_this_machine "${!name}" || fail "$name=${!name} is set, but nothing says how many nodes there are: set WORLD_SIZE (or PET_NNODES, ARNOLD_WORKER_NUM), or unset $name if it is left over."
        done
        nodes=1 from='one node'
    fi

    if [[ $nodes == *:* ]]; then # an elastic job: whoever comes within the limits
        if [[ ! $nodes =~ ^[1-9][0-9]{0,4}:[1-9][0-9]{0,4}$ ]] || ((${nodes%:*} >= ${nodes#*:})); then
            fail "$from is neither a number of nodes nor LEAST:MOST."
        fi
        [[ -n ${PET_RDZV_ENDPOINT:-} && ${PET_RDZV_BACKEND:-static} != static ]] ||
            fail "$from needs a meeting point: PET_RDZV_BACKEND=c10d and PET_RDZV_ENDPOINT=HOST:PORT."
    else
        check_number "${from%%=*}" "$nodes" 1 99999
        check_world_size
        find_setting ARNOLD_ID PET_NODE_RANK NODE_RANK RANK
        if [[ $nodes == 1 ]]; then
            [[ ${FOUND:-0} == 0 ]] || fail "$FOUND_NAME=$FOUND, but $from: nodes count from 0."
            RENDEZVOUS=(--standalone --nproc_per_node="$processes")
            return
        fi
    fi
    if [[ ${PET_STANDALONE:-0} != 0 ]]; then
        fail "PET_STANDALONE=$PET_STANDALONE contradicts $from: every node would train by itself."
    fi
    if [[ ${PET_RDZV_BACKEND:-static} != static ]]; then
        find_meeting_point
        RENDEZVOUS=(--nnodes="$nodes" --nproc_per_node="$processes" "${RENDEZVOUS[@]}")
        return
    fi
    [[ -n $FOUND ]] || find_setting SLURM_NODEID
    rank=$FOUND
    [[ -n $rank ]] || fail "$from, but this node's number from 0 is not set: RANK (or PET_NODE_RANK, ARNOLD_ID). If $from is left over, unset it."
    check_number "$FOUND_NAME" "$rank" 0 $((nodes - 1))
    if [[ -n $SLURM_NNODES && -n ${SLURM_STEP_ID:-} && $rank != "${SLURM_NODEID:-$rank}" ]]; then
        fail "$FOUND_NAME=$rank contradicts SLURM_NODEID=$SLURM_NODEID; unset what is left over."
    fi
    find_meeting_point
    RENDEZVOUS=(--nnodes="$nodes" --node_rank="$rank" --nproc_per_node="$processes"
        "${RENDEZVOUS[@]}")
}

# WORLD_SIZE counts nodes in some pods and processes in others. (For find_cluster only.)
check_world_size() {
    local size=${WORLD_SIZE:-}
    [[ -n $size ]] || return 0
    check_number WORLD_SIZE "$size" 1 9999999
    if [[ $processes == [gc]pu ]]; then
        ((size % nodes == 0)) && return
    elif ((size == nodes || size == nodes * processes)); then
        return
    fi
    fail "WORLD_SIZE=$size contradicts $from: it is neither the number of nodes nor that of processes ($processes a node)."
}

# Where the nodes meet. (For find_cluster only: nodes, rank, from.)
find_meeting_point() {
    local address=${PET_RDZV_ENDPOINT:-} nodelist=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}
    if [[ -n ${PET_RDZV_BACKEND:-}${PET_RDZV_ENDPOINT:-} ]]; then
        [[ -n $address ]] || fail "PET_RDZV_BACKEND=$PET_RDZV_BACKEND and $from, but PET_RDZV_ENDPOINT (HOST:PORT, where the nodes meet) is not set."
        if is_this_machine "${address%:*}" && [[ ${rank:-other} != 0 ]]; then
            fail "PET_RDZV_ENDPOINT=$address and $from: it must be an address that all nodes reach."
        fi
        RENDEZVOUS=(--rdzv_backend="${PET_RDZV_BACKEND:-static}" --rdzv_endpoint="$address")
        [[ -z ${PET_RDZV_ID:-} ]] || RENDEZVOUS+=(--rdzv_id="$PET_RDZV_ID")
        return
    fi
    # The first pod of a PyTorchJob may know itself as localhost.
    local MASTER_ADDR=${MASTER_ADDR:-}
    if is_this_machine "$MASTER_ADDR" && [[ -n ${ARNOLD_WORKER_0_HOST:-}${PET_MASTER_ADDR:-}$nodelist ]]; then
        MASTER_ADDR=''
    fi
    find_setting ARNOLD_WORKER_0_HOST PET_MASTER_ADDR MASTER_ADDR
    address=$FOUND
    if [[ -z $address ]]; then
        [[ -n $nodelist ]] || fail "$from, but the first node's address is not set: MASTER_ADDR (or PET_MASTER_ADDR, ARNOLD_WORKER_0_HOST). If $from is left over, unset it."
        command -v scontrol >/dev/null || fail "a SLURM job on $nodes nodes, but scontrol (which names the first) is not on PATH."
        address=$(scontrol show hostnames "$nodelist" | head -n 1)
        [[ -n $address ]] || fail "scontrol names no host for the nodes '$nodelist'."
        if [[ -z ${SLURM_STEP_ID:-} ]]; then
            echo "warning: not inside srun; torchrun waits until all $nodes nodes have started this." >&2
        fi
    elif is_this_machine "$address" && ((rank > 0)); then
        fail "$FOUND_NAME=$address on node $rank: it must be the first node's address as the others reach it."
    fi
    # Else torchrun looks for such a host until its time is up. (An IPv6 address has more colons.)
    [[ $address != *[[:space:]/]* && ! $address =~ ^[^:]*:[0-9]*$ ]] ||
        fail "$FOUND_NAME=$address is no host name or address; a port belongs into MASTER_PORT."
    find_setting ARNOLD_WORKER_0_PORT PET_MASTER_PORT MASTER_PORT
    # Jobs that share a node must not share a port.
    FOUND=${FOUND:-${SLURM_JOB_ID:+$((20000 + SLURM_JOB_ID % 10000))}}
    check_number "${FOUND_NAME:-port}" "${FOUND:=29500}" 1 65535
    RENDEZVOUS=(--master_addr="$address" --master_port="$FOUND")
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

# Visual-OPSD itself, for the launchers that differ in the visual thoughts only:
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
