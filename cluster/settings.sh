# shellcheck shell=bash
# Sourced by the scripts of Run:ai and SLURM: reads their settings files.

# complain LINE: one line on stderr, and the exit code of a configuration that a person must mend (EX_CONFIG)
complain() {
    printf '%s\n' "$1" >&2
    exit 78
}

# read_settings FILE: lines of NAME=VALUE become variables of the environment. A value is taken as it stands, to the end
# of its line: no quotes, nothing is expanded, nothing is run. An empty one is none. What the environment has
# already, wins.
read_settings() {
    local line name number=0
    [[ -r $1 ]] || complain "no settings at $1; copy settings.env.example to settings.env beside it and fill it in"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%$'\r'}
        [[ -z $line || $line == \#* ]] && continue
        name=${line%%=*}
        [[ $line == *=* && $name =~ ^[A-Z][A-Z0-9_]*$ ]] ||
            complain "$1, line $number: expected NAME=VALUE with a name in capitals, got '$line'"
        [[ -v $name || -z ${line#*=} ]] || export "$name=${line#*=}"
    done <"$1"
}

# need NAME...: that these settings have a value
need() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || complain "the setting $name is empty; give it a value in ${SETTINGS:-settings.env}"
    done
}
