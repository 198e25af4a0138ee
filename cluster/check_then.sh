#!/bin/bash
# A stage as a job without an init container: check_then.sh torchrun -m monai.bundle run --args_file FILE [--NAME VALUE ...]
# Asks medgen check about FILE and what follows it first, and ends as that does where it is not content: 78 where a
# person must mend something, 75 where the next attempt may succeed.
set -euo pipefail
checked=("$@")
while [[ ${checked[0]-} != --args_file ]]; do
    checked=("${checked[@]:1}")
    ((${#checked[@]} > 1)) || { echo "expected a command with --args_file FILE, got '$*'" >&2 && exit 78; }
done
# as the first process of a container bash would not hear SIGTERM, nor hand it on
trap 'kill "$!" || true; exit 75' TERM
medgen check "${checked[@]:1}" &
wait "$!"
exec "$@"
