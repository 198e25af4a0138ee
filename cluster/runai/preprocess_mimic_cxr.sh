#!/bin/bash
# MIMIC-CXR to PNGs, splits and captions: preprocess_mimic_cxr.sh [STEP] [SHARDS]; each step when the one before is done.
# organise in shards, organise --merge, then create_ids, sections and sentences in one pod each
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
STEP=${ARGUMENTS[0]:-organise}
COMMAND=(bash "$IN_IMAGE/cluster/accept_rejected.sh" python -m preprocessing.mimic_cxr "$STEP"
    --source /data/raw/mimic-cxr-jpg/2.0.0 --target /data/mimic_cxr)
[[ $STEP == organise ]] || MERGE=yes
in_shards "preprocess-mimic-cxr-${STEP//_/-}" "${ARGUMENTS[1]:-32}" \
    --cpu-core-request 8 --cpu-memory-request 16Gi --cpu-memory-limit 16Gi --working-dir /tmp \
    -- "${COMMAND[@]}"
