# What the demos of all bundles share; sourced by bundles/NAME/demo.sh in the root of the repository.
# OUT, DATALIST and DATASET_DIR come from make; PYTHON is the environment's interpreter.
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }
PYTHON=$(absolute "${PYTHON:-.venv/bin/python}")
OUT=$(absolute "${OUT:-demo_output}")
# two threads of PyTorch beside another busy process wait for each other: one is far faster there, and little slower alone
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
show() {
    printf '\n$'
    for word in "$@"; do
        if [[ $word =~ [^A-Za-z0-9_./:=-] ]]; then printf ' "%s"' "$word"; else printf ' %s' "$word"; fi
    done
    printf '\n'
    "$@"
}
