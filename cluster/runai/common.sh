# shellcheck shell=bash
# Sourced by the scripts of this folder: settings.env, the flags that all workloads share, and how they are submitted.
# Options of every script: --dry-run prints the commands; --merge submits the merge of a stage's shards, once all are done.
set -euo pipefail
CLUSTER=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=cluster/settings.sh
source "$CLUSTER/settings.sh"
SETTINGS=${SETTINGS:-$CLUSTER/runai/settings.env}
read_settings "$SETTINGS"
need PROJECT IMAGE DATA_PVC OUTPUT_PVC
IN_IMAGE=/opt/medgen
DRY_RUN=
MERGE=
ARGUMENTS=()
for word in "$@"; do
    case $word in
    --dry-run) DRY_RUN=yes ;;
    --merge) MERGE=yes ;;
    -*) complain "no option $word; there are --dry-run and --merge" ;;
    *) ARGUMENTS+=("$word") ;;
    esac
done

# expect NAME FORM HINT: a comma or a space in a value would become another field of a flag
expect() {
    [[ -z ${!1:-} || ${!1} =~ ^$2$ ]] || complain "$1 must be $3, got '${!1}'; change it in $SETTINGS"
}
NAME_FORM='[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?'
for setting in PROJECT DATA_PVC OUTPUT_PVC MLFLOW_SECRET; do
    expect "$setting" "$NAME_FORM" 'a Kubernetes name'
done
expect NODE_POOLS "$NAME_FORM( $NAME_FORM)*" 'names of node pools with a space between them'
expect GPU_TYPE '[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?' 'the value of a node-type label'
expect IMAGE '[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}' 'an image with its digest, NAME@sha256:...'
expect MLFLOW_TRACKING_URI 'https?://[^[:space:]]+' 'an address that begins with http'
expect RUN_AS_UID '[1-9][0-9]*' 'a user id that is not root'
expect RUN_AS_GID '[0-9]+' 'a group id'
expect PREEMPTIBILITY '(non-)?preemptible' 'preemptible or non-preemptible'
expect BACKOFF_LIMIT '[0-9]+' 'a whole number'

SHARED=(
    --project "$PROJECT"
    --image "$IMAGE"
    --image-pull-policy IfNotPresent
    --existing-pvc "claimname=$OUTPUT_PVC,path=/outputs"
    --existing-pvc "claimname=$DATA_PVC,path=/data"
    --environment-variable DATA_DIR=/data
    --environment-variable OUTPUT_DIR=/outputs
    --environment-variable HOME=/tmp
    --environment-variable USER=medgen # MONAI asks for the user's name, and a UID without an entry in /etc/passwd has none
    --run-as-uid "${RUN_AS_UID:-10001}"
    --run-as-gid "${RUN_AS_GID:-10001}"
    --run-as-non-root
    --seccomp-profile RuntimeDefault
    --preemptibility "${PREEMPTIBILITY:-preemptible}"
    --backoff-limit "${BACKOFF_LIMIT:-6}"
    --termination-grace-period 120s # the last checkpoint is written in it
)
read -ra pools <<<"${NODE_POOLS:-}"
for pool in "${pools[@]}"; do SHARED+=(--node-pools "$pool"); done
[[ -z ${MLFLOW_TRACKING_URI:-} ]] || SHARED+=(--environment-variable "MLFLOW_TRACKING_URI=$MLFLOW_TRACKING_URI")
if [[ -n ${MLFLOW_SECRET:-} ]]; then
    for key in MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD; do SHARED+=(--env-secret "$key=$MLFLOW_SECRET,key=$key"); done
fi
ON_GPUS=()
[[ -z ${GPU_TYPE:-} ]] || ON_GPUS+=(--node-type "$GPU_TYPE")
TORCHRUN=(--environment-variable TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110) # ten seconds less than the grace period

# submit VERB... NAME FLAG... --command -- COMMAND...: runai, or with --dry-run what would be run
submit() {
    local word command=
    for word in "$@"; do # Run:ai joins the command to one string and takes it apart again: a quote would be lost
        [[ -z $command || $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] ||
            complain "a command for Run:ai must do without quotes, got '$word'; put it into a file of the image"
        [[ $word != -- ]] || command=yes
    done
    if [[ -n $DRY_RUN ]]; then
        printf 'runai'
        printf ' %q' "$@"
        printf '\n'
    else
        runai "$@"
    fi
}

# stage NAME: that there is such an args file; sets WORKLOAD, its name on the cluster, and FOLDER and ARGS_FILE in the image
stage() {
    [[ $1 =~ ^[a-z0-9_]+\.[a-z0-9_]+$ && -f $CLUSTER/args/$1.json ]] ||
        complain "no stage $1; the stages are the names of cluster/args/*.json without .json"
    WORKLOAD=${1//[._]/-}
    FOLDER=$IN_IMAGE/bundles/${1%%.*}
    ARGS_FILE=$IN_IMAGE/cluster/args/$1.json
}

# train STAGE FLAG...: torchrun on the GPUs of one pod
train() {
    stage "$1"
    submit training standard submit "$WORKLOAD" "${SHARED[@]}" "${ON_GPUS[@]}" "${TORCHRUN[@]}" --restart-policy Never \
        --environment-variable PET_STANDALONE=1 --environment-variable PET_NPROC_PER_NODE=gpu \
        --environment-variable PET_MAX_RESTARTS=3 "${@:2}" \
        --working-dir "$FOLDER" --command -- torchrun -m monai.bundle run --args_file "$ARGS_FILE"
}

# train_on_nodes STAGE NODES FLAG...: torchrun in each of several pods; the operator tells them PET_NNODES and the rest
train_on_nodes() {
    stage "$1"
    # the master trains as well: pods = workers + 1; their processes start anew together, with the pods
    submit training pytorch submit "$WORKLOAD" --workers "$(($2 - 1))" "${SHARED[@]}" "${ON_GPUS[@]}" "${TORCHRUN[@]}" \
        --environment-variable PET_MAX_RESTARTS=0 --restart-policy OnFailure --master-restart-policy OnFailure --clean-pod-policy Running "${@:3}" \
        --working-dir "$FOLDER" --command -- torchrun -m monai.bundle run --args_file "$ARGS_FILE"
}

# evaluate STAGE FLAG...: one process in one pod
evaluate() {
    stage "$1"
    submit training standard submit "$WORKLOAD" "${SHARED[@]}" "${ON_GPUS[@]}" --restart-policy Never "${@:2}" \
        --working-dir "$FOLDER" --command -- python -m monai.bundle run --args_file "$ARGS_FILE"
}

# in_shards NAME SHARDS FLAG... -- COMMAND...: a workload for each shard, or with --merge one for all; runai's own
# --parallelism starts pods that do not know which of them they are
in_shards() {
    local name=$1 shards=$2 flags=() i
    shift 2
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    [[ $shards =~ ^[1-9][0-9]{0,3}$ ]] || complain "expected a number of shards up to 9999, got '$shards'"
    if [[ -n $MERGE ]]; then
        submit training standard submit "$name-merge" "${SHARED[@]}" --restart-policy Never "${flags[@]}" --command -- "$@"
        return
    fi
    for ((i = 0; i < shards; i++)); do
        submit training standard submit "$name-$i" "${SHARED[@]}" --restart-policy Never "${flags[@]}" \
            --command -- "$@" --shard "$i/$shards"
    done
}

# stage_in_shards STAGE FLAG...: as many as the script's argument says, else SHARDS
stage_in_shards() {
    stage "$1"
    in_shards "$WORKLOAD" "${ARGUMENTS[0]:-${SHARDS:-8}}" "${ON_GPUS[@]}" "${@:2}" --working-dir "$FOLDER" \
        -- python -m monai.bundle run --args_file "$ARGS_FILE"
}
