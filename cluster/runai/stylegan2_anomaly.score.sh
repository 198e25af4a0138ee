#!/bin/bash
# Scores projected images and draws their anomaly maps, in shards; no GPU.
# stylegan2_anomaly.score.sh [SHARDS [NUMBER...]]; when all are done, stylegan2_anomaly.score.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards stylegan2_anomaly.score 8 \
    --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
