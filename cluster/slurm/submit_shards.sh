#!/bin/bash
# An array and the job that merges its results, which starts when all tasks have succeeded:
#   cluster/slurm/submit_shards.sh 8 stylegan2_anomaly.project
#   cluster/slurm/submit_shards.sh 32 -- python -m preprocessing.chestxray14 --source ... --target ...
# Prints the number of the merging job, for what comes after: AFTER=JOB cluster/slurm/submit_shards.sh ..., or
# sbatch --dependency=afterok:JOB. A command of its own and stylegan2_anomaly.score get no GPU. Variables such as
# SBATCH_TIMELIMIT are options of sbatch for both jobs (man sbatch, INPUT ENVIRONMENT VARIABLES).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
shards=${1:?how many shards}
shift
[[ $shards =~ ^[1-9][0-9]*$ ]] || { echo "expected a number of shards, got '$shards'" >&2; exit 78; }
[[ ${1:-} != -- && ${1:-} != stylegan2_anomaly.score ]] || export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-0}
submit=(sbatch --parsable --kill-on-invalid-dep=yes)
array=$("${submit[@]}" ${AFTER:+"--dependency=afterok:$AFTER"} --array="0-$((shards - 1))" cluster/slurm/array.sbatch "$@")
array=${array%%;*} # a cluster's name may follow
merge=$("${submit[@]}" --dependency="afterok:$array" cluster/slurm/array.sbatch "$@")
echo "shards: job $array, merge: job ${merge%%;*}" >&2
echo "${merge%%;*}"
