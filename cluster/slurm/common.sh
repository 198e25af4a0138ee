# shellcheck shell=bash
# Sourced by the batch scripts: settings, the command of a stage, and what follows when it ends.
set -euo pipefail
# shellcheck source=cluster/settings.sh
source "$MEDGEN_ROOT/cluster/settings.sh"
SETTINGS=${SETTINGS:-$MEDGEN_ROOT/cluster/slurm/settings.env}
read_settings "$SETTINGS"
need DATA_DIR OUTPUT_DIR
export DATA_DIR OUTPUT_DIR
mkdir -p "$OUTPUT_DIR"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun waits so long for the last checkpoint: ten seconds less than --signal leaves
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
[[ -z ${VENV:-} ]] || export PATH="$VENV/bin:$PATH"

# squeue, scancel and scontrol take the number of an array's last task for all of them
JOB=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# how often this job has failed since it was last told to stop; SLURM_RESTART_COUNT counts the end of its time as well
FAILURES=$OUTPUT_DIR/.failures-$JOB
# an image brings its own code and configs: what is installed there must not meet those of another revision
CODE=$MEDGEN_ROOT
[[ -z ${IMAGE:-} ]] || CODE=/opt/medgen

SHARD=() # --shard i/n, of a task of an array

# find_stage NAME: sets ARGS_FILE and FOLDER, the bundle's folder, for an args file's name such as cxr_pggan.train
find_stage() {
    ARGS_FILE=$MEDGEN_ROOT/cluster/args/$1.json
    FOLDER=$CODE/bundles/${1%%.*}
    [[ $1 =~ ^[a-z0-9_]+\.[a-z0-9_]+$ && -f $ARGS_FILE ]] ||
        complain "no stage $1; the stages are the names of cluster/args/*.json without .json"
}

# in_image COMMAND...: sets COMMAND, in the container image if the settings name one; it begins in FOLDER
in_image() {
    COMMAND=("$@")
    if [[ -z ${IMAGE:-} ]]; then
        cd "$FOLDER"
        return
    fi
    COMMAND=("${APPTAINER:-apptainer}" exec --nv --pwd "$FOLDER" --bind "$MEDGEN_ROOT:$MEDGEN_ROOT:ro"
        --bind "$DATA_DIR:$DATA_DIR:${DATA_ACCESS:-ro}" --bind "$OUTPUT_DIR:$OUTPUT_DIR" "$IMAGE" "$@")
}

# A signal comes to this shell alone (--signal=B:TERM). scancel passes it on to the step: srun itself would end at SIGTERM
# and take its tasks along.
told_to_stop=
step=
pass_on() {
    told_to_stop=yes
    [[ -n $step ]] || return 0
    until scancel --signal=TERM "$JOB.0" 2>/dev/null || ! kill -0 "$step" 2>/dev/null; do sleep 1; done
}
trap pass_on TERM

# end_job CODE: ends with this code; puts the job back into the queue where it was told to stop, and a few times where it
# failed
end_job() {
    local requeues=${SLURM_RESTART_COUNT:-0} limit=${MAX_REQUEUES:-100} why=' after it was told to stop' failures=0
    trap '' TERM
    if [[ -z $told_to_stop && $1 != 0 ]]; then
        [[ ! -e $FAILURES ]] || failures=$(<"$FAILURES")
        requeues=$failures limit=${MAX_FAILURE_REQUEUES:-3} why=
    fi
    rm -f "$FAILURES"
    if (($1 == 0)); then exit 0; fi
    # a job that its owner has cancelled, or that Slurm requeues itself, is not running any more
    if [[ $(squeue --noheader --format=%T --jobs="$JOB") != RUNNING ]]; then
        echo "job $JOB was ended from outside" >&2
    elif ((requeues < limit)); then
        echo "job $JOB ended with code $1$why; requeue $((requeues + 1)) of at most $limit" >&2
        [[ -n $told_to_stop ]] || echo "$((failures + 1))" >"$FAILURES"
        scontrol requeue "$JOB"
        sleep 60 # Slurm ends this shell
    else
        echo "job $JOB ended with code $1$why after $requeues requeues; it stays ended" >&2
    fi
    exit "$1"
}

# check_stage: a configuration that cannot work ends the job before it takes the GPUs for long, and for good
check_stage() {
    local code=0
    in_image medgen check "$ARGS_FILE" "${SHARD[@]}"
    "${COMMAND[@]}" || code=$?
    if ((code != 0 && code != 75)); then
        rm -f "$FAILURES"
        complain "job $JOB is not started: its configuration cannot work"
    fi
    if [[ $code == 75 || -n $told_to_stop ]]; then end_job 75; fi
}

# run_step SRUN_OPTION... COMMAND...: runs a step, ends as it does
run_step() {
    local code=0
    # --wait: after the first process has ended, the others have a minute to write what they hold
    srun --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do # a signal ends a wait, not the step
        code=0
        wait "$step" || code=$?
    done
    end_job "$code"
}
