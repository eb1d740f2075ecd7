# shellcheck shell=bash
# What the job templates share. Sourced by them; submit from the repository's folder.
#   RUN_DIR=FOLDER      the run's folder; the default is the job's own, and stays the same when the job is requeued
#   CONTAINER=pyxis     srun --container-image (enroot);   CONTAINER=apptainer   apptainer exec --nv
#   IMAGE=FILE          its image: nvcr.io#nvidia/pytorch:..., or a *.sqsh or *.sif file, with this package's needs installed
#   MOUNTS=SRC:DST,...  more folders inside the container, such as the models'

# --- where the run lives ---------------------------------------------------------------------------------------------
RUN_DIR="${RUN_DIR:-runs/${SLURM_JOB_NAME:?}-${SLURM_JOB_ID:?}}"
mkdir -p "$RUN_DIR"
# Looked up here, on the host: a container may lack scontrol.
MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | sed -n 1p)}" # not `head`: it would end scontrol by SIGPIPE
export RUN_DIR MASTER_ADDR
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since 22.05 srun does not take it from sbatch

# --- limits: srun hands them to every node -----------------------------------------------------------------------------
ulimit -n "$(ulimit -Hn)"           # sockets of all pairs of ranks, and files of a sharded checkpoint
ulimit -l unlimited 2>/dev/null || true # memory that InfiniBand registers; the preflight says it where this is refused

# --- NCCL: the defaults find NVLink and InfiniBand themselves; set the rest only where the preflight's bandwidth is low -
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO names the network of each connection: NET/IB is right, NET/Socket is TCP
# After a collective hung for its time limit, every rank writes its last 2,000 collectives beside the run.
export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$(realpath "$RUN_DIR")/nccl_trace_"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE
# export NCCL_IB_HCA=mlx5           # use these adapters only: where a node also has storage or Ethernet ports
# export NCCL_SOCKET_IFNAME=bond0   # interface of the rendezvous: where the first one is not reachable from other nodes
# export GLOO_SOCKET_IFNAME=bond0   # the same for gloo (control messages)
# export NCCL_IB_GID_INDEX=3        # RoCE v2 instead of InfiniBand
# export NCCL_CROSS_NIC=0           # rail-optimised fabrics: a GPU talks over its own rail

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

# on_nodes COMMAND ...: one process on each node, in the container if there is one.
on_nodes() { srun "${in_srun[@]}" ${inside[@]+"${inside[@]}"} "$@"; }

# --- stopping before the limit, and going on ---------------------------------------------------------------------------
asked=0
trap 'asked=1' USR1 # from --signal=B:USR1@...: to this shell only, because torchrun would take it as its end

# Runs COMMAND ... on the nodes; after USR1 asks the run to save and end. If it did, the job goes back into the queue.
train_and_requeue() {
    local step code=0 state
    on_nodes "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        # Again and again: a run that is still starting takes an older STOP file away.
        [ "$asked" = 0 ] || touch "$RUN_DIR/STOP"
        sleep 2 & wait $! || true # a trapped signal ends `wait` at once
    done
    wait "$step" || code=$?
    state=$(sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$RUN_DIR/status.json" 2>/dev/null) || state=unknown
    echo "job $SLURM_JOB_ID: exit code $code, run $state, $RUN_DIR"
    # Only when the clock asked: a STOP file made by hand ends the run, and `scancel` the job, for good.
    if [ "$code" = 0 ] && [ "$state" = requeue ] && [ "$asked" = 1 ]; then
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # until Slurm ends this shell: a job that ended by itself would not be requeued
    fi
    return "$code"
}
