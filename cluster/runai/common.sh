# shellcheck shell=bash
# Sourced by the scripts of this folder: settings.env, the flags that all workloads share, and how they are submitted.
# Options: --dry-run prints the commands; --merge, of a script that works in shards, submits their merge, once all are
# done; --nodes N, of a training, asks for N nodes with as many GPUs each as the script says.
set -euo pipefail
CLUSTER=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=cluster/settings.sh
source "$CLUSTER/settings.sh"
SETTINGS=${SETTINGS:-$CLUSTER/runai/settings.env}
read_settings "$SETTINGS"
need PROJECT
IN_IMAGE=/opt/medgen
DRY_RUN=
MERGE=
NODES=
ARGUMENTS=()
SCRIPT=${0##*/}
while (($# > 0)); do
    case $1 in
    --dry-run) DRY_RUN=yes ;;
    --merge) MERGE=yes ;;
    --nodes)
        NODES=${2:-}
        [[ $NODES =~ ^[2-9]$|^[1-9][0-9]{1,3}$ ]] || complain "expected two nodes or more after --nodes, got '$NODES'"
        shift
        ;;
    -*) complain "no option $1; there are --dry-run, --merge (shards) and --nodes (trainings)" ;;
    *) ARGUMENTS+=("$1") ;;
    esac
    shift
done

# take NUMBER OPTION...: that the script was given at most so many arguments, and of --merge and --nodes only these
take() {
    ((${#ARGUMENTS[@]} <= $1)) || complain "$SCRIPT takes $1 arguments here, got '${ARGUMENTS[*]}'"
    [[ -z $MERGE || " ${*:2} " == *' --merge '* ]] || complain "$SCRIPT has nothing to merge here: leave out --merge"
    [[ -z $NODES || " ${*:2} " == *' --nodes '* ]] || complain "$SCRIPT is no training: it does not take --nodes"
}

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
    --image "${IMAGE:-}"
    --image-pull-policy IfNotPresent
    --existing-pvc "claimname=${OUTPUT_PVC:-},path=/outputs"
    --existing-pvc "claimname=${DATA_PVC:-},path=/data"
    --environment-variable DATA_DIR=/data
    --environment-variable OUTPUT_DIR=/outputs
    --environment-variable HOME=/tmp
    --environment-variable USER=medgen # MONAI asks for the user's name, and a UID without an entry in /etc/passwd has none
    --run-as-uid "${RUN_AS_UID:-10001}"
    --run-as-gid "${RUN_AS_GID:-10001}"
    --run-as-non-root
    --seccomp-profile RuntimeDefault
    --preemptibility "${PREEMPTIBILITY:-preemptible}"
    --backoff-limit "${BACKOFF_LIMIT:-100}"
)
read -ra pools <<<"${NODE_POOLS:-}"
for pool in "${pools[@]}"; do SHARED+=(--node-pools "$pool"); done
[[ -z ${MLFLOW_TRACKING_URI:-} ]] || SHARED+=(--environment-variable "MLFLOW_TRACKING_URI=$MLFLOW_TRACKING_URI")
if [[ -n ${MLFLOW_SECRET:-} ]]; then
    for key in MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD; do SHARED+=(--env-secret "$key=$MLFLOW_SECRET,key=$key"); done
fi
ON_GPUS=()
[[ -z ${GPU_TYPE:-} ]] || ON_GPUS+=(--node-type "$GPU_TYPE")
# the last checkpoint is written in the grace period; torchrun waits for it ten seconds less
TORCHRUN=(--termination-grace-period 120s --environment-variable TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110)
IN_PIECES=(--termination-grace-period 30s) # nothing to save: what is done of a stage lies in files
CHECKED=(bash "$IN_IMAGE/cluster/check_then.sh")

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
        command -v runai >/dev/null || complain 'there is no runai on the PATH; install the command line, version 2, and log in'
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

# train STAGE FLAG...: torchrun on the GPUs of one pod, or with --nodes of several
train() {
    local verb flags=()
    take 0 --nodes
    need IMAGE DATA_PVC OUTPUT_PVC
    stage "$1"
    if [[ -z $NODES ]]; then
        verb=standard
        flags+=(--restart-policy Never --environment-variable PET_MAX_RESTARTS=3
            --environment-variable PET_STANDALONE=1 --environment-variable PET_NPROC_PER_NODE=gpu)
    else
        verb=pytorch # the operator tells each pod PET_NNODES and the rest
        # The master trains as well: pods = workers + 1. Where one process is lost, those of all pods end, and kubelet
        # starts each container again by itself; they meet at the next rendezvous. Each counts as a restart.
        flags+=(--workers "$((NODES - 1))" --restart-policy OnFailure --master-restart-policy OnFailure
            --clean-pod-policy Running --environment-variable PET_MAX_RESTARTS=0)
    fi
    submit training "$verb" submit "$WORKLOAD" "${SHARED[@]}" "${ON_GPUS[@]}" "${TORCHRUN[@]}" "${flags[@]}" "${@:2}" \
        --working-dir "$FOLDER" --command -- "${CHECKED[@]}" torchrun -m monai.bundle run --args_file "$ARGS_FILE"
}

# evaluate STAGE FLAG...: one process in one pod
evaluate() {
    take 0
    need IMAGE DATA_PVC OUTPUT_PVC
    stage "$1"
    submit training standard submit "$WORKLOAD" "${SHARED[@]}" "${ON_GPUS[@]}" "${IN_PIECES[@]}" --restart-policy Never \
        "${@:2}" --working-dir "$FOLDER" \
        --command -- "${CHECKED[@]}" python -m monai.bundle run --args_file "$ARGS_FILE"
}

# in_one NAME FLAG... -- COMMAND...: a workload of one pod
in_one() {
    local name=$1 flags=()
    need IMAGE DATA_PVC OUTPUT_PVC
    shift
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    submit training standard submit "$name" "${SHARED[@]}" "${IN_PIECES[@]}" --restart-policy Never "${flags[@]}" \
        --command "$@"
}

# in_shards NAME SHARDS [NUMBER...] FLAG... -- COMMAND...: a workload for each shard, or for those of these numbers, or
# with --merge one for all; runai's own --parallelism starts pods that do not know which of them they are
in_shards() {
    local name=$1 shards=$2 numbers=() failed=() i
    shift 2
    while [[ $1 != -* ]]; do
        numbers+=("$1")
        shift
    done
    if [[ -n $MERGE ]]; then
        in_one "$name-merge" "$@"
        return
    fi
    [[ $shards =~ ^[1-9][0-9]{0,3}$ ]] || complain "expected a number of shards up to 9999, got '$shards'"
    for i in "${numbers[@]}"; do
        [[ $i =~ ^(0|[1-9][0-9]{0,3})$ && $i -lt $shards ]] ||
            complain "expected numbers of shards from 0 to $((shards - 1)), got '$i'"
    done
    ((${#numbers[@]} > 0)) || for ((i = 0; i < shards; i++)); do numbers+=("$i"); done
    for i in "${numbers[@]}"; do
        in_one "$name-$i" "$@" --shard "$i/$shards" || failed+=("$i")
    done
    ((${#failed[@]} == 0)) || {
        echo "${#failed[@]} of ${#numbers[@]} shards were not submitted; again, when what runai says is mended (a workload" \
            "of an earlier attempt: runai training standard delete $name-${failed[0]}): $SCRIPT ... $shards ${failed[*]}" >&2
        return 1
    }
}

# stage_in_shards STAGE SHARDS FLAG...: the script's own arguments are another number of shards, and which of them
stage_in_shards() {
    local stage=$1 shards=("${ARGUMENTS[@]:-$2}")
    if [[ -n $MERGE ]]; then take 0 --merge; else take 10000; fi
    stage "$stage"
    in_shards "$WORKLOAD" "${shards[@]}" "${ON_GPUS[@]}" "${@:3}" --working-dir "$FOLDER" \
        -- "${CHECKED[@]}" python -m monai.bundle run --args_file "$ARGS_FILE"
}

# steps FIRST...: sets STEP to the script's first argument, one of these or else the first of them
steps() {
    STEP=${ARGUMENTS[0]:-$1}
    [[ " $* " == *" $STEP "* ]] || complain "$SCRIPT has the steps $*, got '$STEP'"
    ARGUMENTS=("${ARGUMENTS[@]:1}")
}

# preprocess NAME SHARDS COMMAND...: a command of preprocessing on CPUs, in so many shards or, where SHARDS is 1, in one
# pod; the script's other arguments are another number of shards, and which of them
preprocess() {
    local name=preprocess-${1//_/-} shards=("${ARGUMENTS[@]:-$2}")
    local flags=(--cpu-core-request 8 --cpu-memory-request 16Gi --cpu-memory-limit 16Gi --working-dir /tmp)
    local command=(bash "$IN_IMAGE/cluster/accept_rejected.sh" python -m "${@:3}")
    if [[ $2 == 1 ]]; then
        take 0
        in_one "$name" "${flags[@]}" -- "${command[@]}"
    else
        if [[ -n $MERGE ]]; then take 0 --merge; else take 10000; fi
        in_shards "$name" "${shards[@]}" "${flags[@]}" -- "${command[@]}"
    fi
}
