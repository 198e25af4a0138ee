# What the demos of all bundles share; sourced by bundles/NAME/demo.sh in the root of the repository.
# OUT, DATALIST and DATASET_DIR come from make; PYTHON is the environment's interpreter.
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }
PYTHON=$(absolute "${PYTHON:-.venv/bin/python}")
OUT=$(absolute "${OUT:-demo_output}")
# two threads of PyTorch beside another busy process wait for each other: one is far faster there, and little slower alone
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset MLFLOW_TRACKING_URI # a demo is tracked in its own folder
show() {
    printf '\n$'
    for word in "$@"; do
        if [[ $word =~ [^A-Za-z0-9_./:=-] ]]; then printf ' "%s"' "$word"; else printf ' %s' "$word"; fi
    done
    printf '\n'
    "$@"
}
# Register what was trained, and promote it if its figures are good enough; sets SERVE, the command that serves it.
# register NAME TRAINING METRICS REQUIREMENT OVERLAY...
register() {
    local name=$1 training=$2 metrics=$3 requirement=$4 served=models:/$1/1 overlays=()
    local registry=("$PYTHON" -m medgen registry) tracker=(--tracking_uri "sqlite:///$training/mlflow.db")
    for overlay in "${@:5}"; do overlays+=(--overlay "$overlay"); done
    show "${registry[@]}" register . --name "$name" --weights "$training/model.pt" --metrics "$metrics" \
        --training "$training" "${overlays[@]}" "${tracker[@]}"
    if show "${registry[@]}" promote "$name" 1 --require "$requirement" "${tracker[@]}"; then
        served=models:/$name@champion
    fi
    SERVE="${registry[*]} serve $served ${tracker[*]}"
}
