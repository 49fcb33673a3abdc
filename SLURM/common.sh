# What the batch scripts share; they source it from the folder of the code. No job of its own.

# Exit codes of megatron_implicit/exits.py.
DONE=0 FAILURE=1 USAGE=2 REQUEUE=75

say() { printf '%s %s\n' "$(date '+%F %T')" "$1" >&2; }

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-$USAGE}"
}

# Takes the cluster's settings, prepares the node and finds the interpreter ($python).
enter_cluster() {
    local settings=${CLUSTER:-SLURM/cluster.env} given=${PYTHON:-}
    setup_node() { :; }
    if [[ -f $settings ]]; then
        # shellcheck source=/dev/null
        source "$settings"
    elif [[ -n ${CLUSTER:-} ]]; then
        fail "CLUSTER=$settings: no such file; SLURM/cluster.nvidia.env and SLURM/cluster.mi300x.env are examples"
    fi
    setup_node || fail "setup_node of $settings failed" "$FAILURE"
    python=${PYTHON:-${given:-$SLURM_SUBMIT_DIR/.venv/bin/python}}
    if [[ -z ${CONTAINER:-} && ${SRUN_ARGUMENTS:-} != *--container-* && ! -x $(command -v "$python") ]]; then
        fail "there is no $python: run 'bash launch/setup.sh' on the login node, or set PYTHON in $settings"
    fi
    export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of the shell that submitted
}

# run_step COMMAND...: one task a rank on all nodes of the job, in the container if there is one.
run_step() {
    local options=(--kill-on-bad-exit=1 --mpi="${MPI:-none}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    if [[ ${SRUN_ARGUMENTS:-} == *--container-image* && ${SRUN_ARGUMENTS:-} != *--container-workdir* ]]; then
        options+=(--container-workdir="$PWD") # pyxis starts in the image's own otherwise
    fi
    # shellcheck disable=SC2086  # settings of several words
    srun "${options[@]}" ${SRUN_ARGUMENTS:-} ${CONTAINER:-} "$@"
}
