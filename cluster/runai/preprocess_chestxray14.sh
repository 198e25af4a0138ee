#!/bin/bash
# ChestX-ray14 to PNGs and a datalist: preprocess_chestxray14.sh [SHARDS]; when all are done, with --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
in_shards preprocess-chestxray14 "${ARGUMENTS[0]:-16}" \
    --cpu-core-request 8 --cpu-memory-request 16Gi --cpu-memory-limit 16Gi --working-dir /tmp \
    -- bash "$IN_IMAGE/cluster/accept_rejected.sh" python -m preprocessing.chestxray14 \
    --source /data/raw/chestxray14 --target /data/chestxray14
