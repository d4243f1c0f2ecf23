# What the scripts beside this one have in common. Sourced by them; `fastmoco slurm render` writes it into theirs.
# shellcheck shell=bash

# --- Program and container ---------------------------------------------------------------------------------------

# How fastmoco is called. A job has the environment of the shell that submitted it: activate yours before sbatch.
fastmoco=(fastmoco)
# Empty, an image for `srun --container-image` (NVIDIA's pyxis), or a file .sif for apptainer. fastmoco is inside it.
container=""
# Folders that the container sees, FROM:TO,...
container_mounts="$PWD:$PWD"
# How often a job may be put back into the queue.
max_requeues=10

pyxis=() within=()
case $container in
"") ;;
*.sif) within=(apptainer exec --nv --bind "$container_mounts" --pwd "$PWD" "$container") ;;
*) pyxis=(--container-image="$container" --container-mounts="$container_mounts" --container-workdir="$PWD") ;;
esac

# --- Environment of every process --------------------------------------------------------------------------------

# srun does not take --cpus-per-task over from sbatch since SLURM 22.05.
if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
fi
export PYTHONUNBUFFERED=1

# Processes meet at the first node of their step (SLURM_STEP_NODELIST), at a port derived from the job's number.
# Only where that does not do, because nodes have several names or ports are closed:
# export MASTER_ADDR=... MASTER_PORT=...

# NCCL. The defaults are right on most clusters; `fastmoco doctor --distributed` shows what they give.
# WARN says why NCCL failed; INFO also says which network it took ("NET/IB" or "NET/Socket").
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Where nodes have several networks, the one to meet over, by its interface's name (`ip -br addr`): gloo, which carries
# decisions, takes the one that the host's own name stands for, NCCL the first that is up.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# Which InfiniBand adapters carry data, where some belong to storage; "=" takes the names as they are.
# export NCCL_IB_HCA="=mlx5_0,mlx5_1"
# 1 keeps off InfiniBand and RoCE, to see whether they are what fails; slow.
# export NCCL_IB_DISABLE=1
# RoCE only: the index of the address to use (`show_gids`), 3 on most.
# export NCCL_IB_GID_INDEX=3

# --- Running -----------------------------------------------------------------------------------------------------

# `"${step[@]}" "${program[@]}" ARGUMENTS` is `fastmoco ARGUMENTS` as every task of the job. One that fails ends all.
step=(srun --kill-on-bad-exit=1)
program=("${pyxis[@]}" "${within[@]}" "${fastmoco[@]}")

# once ARGUMENTS: `fastmoco ARGUMENTS` as one process of the first node.
once() {
    if ((${#pyxis[@]})); then
        srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "${program[@]}" "$@"
    else
        "${program[@]}" "$@"
    fi
}

# tried COMMAND: once more, and again, where it fails: SLURM's controller may be busy.
tried() { "$@" || { sleep 2 && "$@"; } || { sleep 4 && "$@"; }; }

# train RECIPE OPTIONS: pretrain, or go on, to the end. A signal (the time is nearly up, or the node is wanted) is passed
# on; the run saves and ends, and the job is put back into the queue, as it is after an accident. Returns srun's status.
train() {
    local asked=0 status srun job state exits first=""
    # What srun says of tasks that ended by themselves, which it prints as everything else.
    exits=$(mktemp) || exits=/dev/null
    # Not by a function: a signal must reach srun itself, not a shell around it. What passes its words on outlives it.
    "${step[@]}" "${program[@]}" pretrain "$@" --resume 2> >(
        trap '' USR1 TERM
        exec sed -u -n "p; /^srun: error: .*: Exited with exit code [0-9]*\$/w $exits" >&2
    ) &
    srun=$!
    trap 'asked=1; kill -USR1 "$srun" || :' USR1 TERM
    # A trapped signal ends the waiting, not what is waited for.
    while :; do
        asked=0 status=0
        wait "$srun" || status=$?
        ((asked && status > 128)) || break
    done
    trap '' USR1 TERM
    # Where one task fails, or has saved and ended before the others, srun ends those by SIGTERM, and has the higher of
    # both as its status.
    if ((status == 143)); then
        for _ in {1..20}; do
            first=$(sed -n '1s/.* //p' "$exits")
            [[ -n $first ]] && break
            sleep 0.1
        done
        status=${first:-$status}
    fi
    [[ $exits == /dev/null ]] || rm -f "$exits"
    ((status == 0)) && return 0
    # One task of an array has the array's number as its job's, which stands for all tasks.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    # A job that was cancelled, or that SLURM requeues by itself, is not running any more. No answer says neither.
    state=$(tried squeue --noheader --format=%T --jobs="$job") || state=""
    if [[ ${state:-RUNNING} != RUNNING ]]; then
        echo "the job ends by SLURM's own doing; it is not requeued from here"
    elif once slurm requeue --status "$status" --max-requeues "$max_requeues" -- "$@"; then
        tried scontrol requeue "$job" || echo "the job could not be requeued: submit it again" >&2
    fi
    return "$status"
}
