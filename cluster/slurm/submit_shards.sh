#!/bin/bash
# An array and the job that merges its results, which starts when all tasks have succeeded:
#   cluster/slurm/submit_shards.sh 8 stylegan2_anomaly.project
#   SBATCH_GPUS_PER_NODE=0 cluster/slurm/submit_shards.sh 32 -- python -m preprocessing.chestxray14 --source ... --target ...
# Such variables are options of sbatch for both jobs (man sbatch, INPUT ENVIRONMENT VARIABLES).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
shards=${1:?how many shards}
shift
[[ $shards =~ ^[1-9][0-9]*$ ]] || { echo "expected a number of shards, got '$shards'" >&2; exit 78; }
array=$(sbatch --parsable --array="0-$((shards - 1))" cluster/slurm/array.sbatch "$@")
merge=$(sbatch --parsable --dependency="afterok:$array" --kill-on-invalid-dep=yes cluster/slurm/array.sbatch "$@")
echo "shards: job $array, merge: job $merge"
