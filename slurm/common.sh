# shellcheck shell=bash
# What the batch scripts share; they source it when their own places are known. Slurm runs a copy of a batch script from
# its spool folder, so the repository is where sbatch was called, unless NEMO_DPO_HOME names another place.
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}

repository=${NEMO_DPO_HOME:-${SLURM_SUBMIT_DIR:?run this script with sbatch}}
settings=${NEMO_DPO_ENV:-$repository/slurm/env.sh}
if [[ -f $settings ]]; then
    # shellcheck source=/dev/null
    source "$settings" # may change the arguments, too: set -- "$@" key=value
fi

# Stops unless every variable named is an absolute path: the same on every node, inside and outside of a container.
need_paths() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || die "$name is not set; set it in $settings or in the environment of sbatch"
        [[ ${!name} == /* ]] || die "$name=${!name} is not an absolute path"
    done
}

# A text as a value of a configuration override.
quoted() {
    printf "'%s'" "${1//\'/\\\'}"
}

# The folders that the ranks see inside a container, at the paths that they have outside: those given, the repository
# and MOUNTS ("source:target,source:target"). Leaves the option's value in $mounts.
mounts=
mount_folders() {
    local folder
    [[ -n ${CONTAINER:-} ]] || return 0
    for folder in "$repository" "$@"; do
        [[ $folder != *[,:]* ]] || die "$folder: paths with a comma or a colon cannot be mounted in a container"
        [[ ,$mounts, == *",$folder:$folder,"* ]] || mounts+=${mounts:+,}$folder:$folder
    done
    mounts+=${MOUNTS:+,$MOUNTS}
}

# Runs python with the arguments in every task of the job, or in those that `tasks` chooses; returns srun's status.
tasks=()
run_python() {
    local srun_options=("${tasks[@]}") container=()
    # Ranks that another one has left behind get a minute to say so.
    srun_options+=(--wait=60)
    if [[ -n ${RESULTS_DIR:-} ]]; then
        local log="${RESULTS_DIR//%/%%}/%x-%j_%t"
        srun_options+=(--output="$log.out" --error="$log.err")
    fi
    if [[ -n ${CONTAINER:-} ]]; then
        case ${CONTAINER_RUNTIME:=pyxis} in
            pyxis) srun_options+=(--container-image="$CONTAINER" --container-mounts="$mounts") ;;
            apptainer) container=(apptainer exec --nv --bind "$mounts" "$CONTAINER") ;;
            *) die "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is neither pyxis nor apptainer" ;;
        esac
    fi
    # A signal goes to every process of a step. The inner shell ignores SIGUSR1, and its place is taken by python, which
    # handles it: so nothing between srun and python dies of it.
    # shellcheck disable=SC2016  # the inner shell expands these
    srun "${srun_options[@]}" "${container[@]}" bash -c \
        'trap "" USR1; cd "$1" && shift && export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" && exec "$@"' \
        _ "$repository" "${PYTHON:-python}" -u "$@"
}

# The job's ranks run a script of the repository on the run that the settings name. A run that was asked to go on later
# leaves a file, and its job is requeued: from here, because a container has neither scontrol nor munge.
run_ranks() {
    local script=$1 nodes marker
    shift
    need_paths PRETRAINED_CHECKPOINT TRAIN_DATA VALID_DATA RESULTS_DIR
    mkdir -p "$RESULTS_DIR"
    marker=$RESULTS_DIR/requeue-$SLURM_JOB_ID
    rm -f "$marker" # of a start that was killed before it could be read
    export NEMO_DPO_REQUEUE_FILE=$marker

    # The ranks meet on the first node. The port follows from the job, so that two jobs on one node do not collide, and
    # from the start, because the old port may still be closing; it is below those that the kernel hands out by itself.
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes[0]:?scontrol named no node}
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 10000))

    mount_folders "$RESULTS_DIR" "${PRETRAINED_CHECKPOINT%/*}" "${TRAIN_DATA%/*}" "${VALID_DATA%/*}"
    local train valid
    train=$(quoted "$TRAIN_DATA") valid=$(quoted "$VALID_DATA")
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES node(s) ×" \
        "$SLURM_NTASKS_PER_NODE ranks, meeting at $MASTER_ADDR:$MASTER_PORT"
    run_python "$repository/$script" \
        trainer.num_nodes="$SLURM_JOB_NUM_NODES" \
        trainer.devices="$SLURM_NTASKS_PER_NODE" \
        pretrained_checkpoint.restore_from_path="$(quoted "$PRETRAINED_CHECKPOINT")" \
        "model.data.data_prefix={train: [$train], validation: [$valid], test: [$valid]}" \
        exp_manager.explicit_log_dir="$(quoted "$RESULTS_DIR")" \
        "$@"
    if [[ -s $marker ]]; then
        requeue "$marker"
    else
        rm -f "$marker.history"
    fi
}

# Asks Slurm to start the job again, unless the last REQUEUE_LIMIT restarts came no further than the one before them.
requeue() {
    local marker=$1 limit=${REQUEUE_LIMIT:-3} lately
    cat "$marker" >>"$marker.history"
    rm "$marker"
    mapfile -t lately < <(tail -n $((limit + 1)) "$marker.history")
    if ((${#lately[@]} > limit)) && [[ $(printf '%s\n' "${lately[@]}" | sort -u | wc -l) == 1 ]]; then
        die "not requeued: $limit restarts in a row ended where the one before had (${lately[0]}). Give the job more" \
            "time, or --signal less, or set REQUEUE_LIMIT; submitted again it goes on from there"
    fi
    echo "job $SLURM_JOB_ID: stopped in time at ${lately[-1]}; asking for a requeue"
    scontrol requeue "$SLURM_JOB_ID" || die "no requeue; submit the job again, and it goes on from there"
    sleep 300 # Slurm ends this script first
    die "asked for a requeue five minutes ago and still here; submit the job again"
}
