#!/bin/bash
# MIMIC-CXR to PNGs, splits and captions: preprocess_mimic_cxr.sh [STEP [SHARDS [NUMBER...]]]; each step when the one
# before is done: organise in shards, organise --merge, then create_ids, sections and sentences in one pod each.
# The reports are no part of MIMIC-CXR-JPG: sections reads them from mimic-cxr-reports.zip of MIMIC-CXR in its folder.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
steps organise create_ids sections sentences
count=1
options=(--source /data/raw/mimic-cxr-jpg/2.0.0 --target /data/mimic_cxr)
[[ $STEP != organise ]] || count=32
[[ $STEP == create_ids ]] || options+=(--workers 8)
preprocess "mimic-cxr-$STEP" "$count" preprocessing.mimic_cxr "$STEP" "${options[@]}"
