# shellcheck shell=bash
# Shared code of the job templates, which source this file. Submit from the repository's folder.
#   RUN_DIR=FOLDER      the run's folder; the default contains the job's number, which a requeued job keeps
#   CONTAINER=pyxis     srun --container-image (enroot);   CONTAINER=apptainer   apptainer exec --nv
#   IMAGE=FILE          the image of the Dockerfile as a *.sqsh or *.sif file (docs/cluster.md), or another with its packages
#   MOUNTS=SRC:DST,...  more folders to mount in the container, such as the models

# --- the run's folder --------------------------------------------------------------------------------------------------
RUN_DIR="${RUN_DIR:-runs/${SLURM_JOB_NAME:?}-${SLURM_JOB_ID:?}}"
mkdir -p "$RUN_DIR"
# Runs on the host: a container may lack scontrol.
MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | sed -n 1p)}" # `head` would kill scontrol by SIGPIPE
export RUN_DIR MASTER_ADDR
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun ignores sbatch's --cpus-per-task since 22.05

# --- limits: srun copies them to every node ----------------------------------------------------------------------------
ulimit -n "$(ulimit -Hn)" # sockets between ranks, files of a sharded checkpoint
ulimit -l unlimited 2>/dev/null || true # memory that InfiniBand registers; the preflight reports a lower limit

# --- NCCL: finds NVLink and InfiniBand by default; set more only if the preflight reports a low bandwidth --------------
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO logs the network of each connection: NET/IB, or NET/Socket (TCP)
# After a collective times out, every rank writes its last 2,000 collectives into the run's folder.
export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$(realpath "$RUN_DIR")/nccl_trace_"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE
# export NCCL_IB_HCA=mlx5           # use only these adapters, if a node also has storage or Ethernet ports
# export NCCL_SOCKET_IFNAME=bond0   # interface of the rendezvous, if other nodes cannot reach the first one
# export GLOO_SOCKET_IFNAME=bond0   # the same for gloo (control messages)
# export NCCL_IB_GID_INDEX=3        # RoCE v2 instead of InfiniBand
# export NCCL_CROSS_NIC=0           # rail-optimised fabrics: each GPU uses its own rail

# --- containers --------------------------------------------------------------------------------------------------------
in_srun=(--kill-on-bad-exit=1 --ntasks-per-node=1) # torchrun starts the ranks of its node
inside=()
case "${CONTAINER:-none}" in
    none) ;;
    pyxis)
        in_srun+=("--container-image=${IMAGE:?CONTAINER=pyxis needs IMAGE}" "--container-workdir=$PWD")
        in_srun+=("--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}")
        ;;
    apptainer)
        inside=(apptainer exec --nv --bind "$PWD${MOUNTS:+,$MOUNTS}" --pwd "$PWD" "${IMAGE:?CONTAINER=apptainer needs IMAGE}")
        ;;
    *) echo "CONTAINER: expected none, pyxis or apptainer, got $CONTAINER" >&2; exit 2 ;;
esac

# on_nodes COMMAND ...: run one process on each node, in the container if there is one.
on_nodes() { srun "${in_srun[@]}" ${inside[@]+"${inside[@]}"} "$@"; }

# --- save before the time limit, and requeue ---------------------------------------------------------------------------
asked=0
trap 'asked=1' USR1 # --signal=B:USR1@... signals only this shell; the signal would kill torchrun

# train_and_requeue COMMAND ...: run COMMAND on the nodes. After USR1, ask the run to save and stop, then requeue the job.
train_and_requeue() {
    local step code=0 state
    on_nodes "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        # Repeat it: a run that is still starting removes an older STOP file.
        [ "$asked" = 0 ] || touch "$RUN_DIR/STOP"
        sleep 2 & wait $! || true # a trapped signal interrupts `wait`
    done
    wait "$step" || code=$?
    state=$(sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$RUN_DIR/status.json" 2>/dev/null) || state=unknown
    echo "job $SLURM_JOB_ID: exit code $code, run $state, $RUN_DIR"
    # Requeue only after USR1: a STOP file made by hand and `scancel` end the run.
    if [ "$code" = 0 ] && [ "$state" = requeue ] && [ "$asked" = 1 ]; then
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # Slurm kills this shell; it would not requeue a job that exited by itself
    fi
    return "$code"
}
