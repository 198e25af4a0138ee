#!/bin/bash
# ChestX-ray14 to PNGs and a datalist: preprocess_chestxray14.sh [SHARDS [NUMBER...]]; when all are done, with --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
preprocess chestxray14 16 preprocessing.chestxray14 --source /data/raw/chestxray14 --target /data/chestxray14 --workers 8
