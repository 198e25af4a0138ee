#!/usr/bin/env bash
# One model for each class of a datalist, one after the other:
#   bash train_each_class.sh --datalist FILE --output_dir DIR [--NAME VALUE for every name at the head of train.json]
# Class K's training goes to DIR/class_K, its weights to DIR/class_K/model.pt. CONFIG_FILE and LAUNCHER may be set:
#   CONFIG_FILE="['configs/train.json','configs/multi_gpu_train.json']" \
#   LAUNCHER="torchrun --standalone --nproc_per_node=4"
set -euo pipefail
CONFIG_FILE=${CONFIG_FILE:-configs/train.json}
read -ra launcher <<<"${LAUNCHER:-${PYTHON:-python}}"
datalist='' output='' rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --datalist | --output_dir | --label | --model_path | --config_file)
            if [ $# -lt 2 ]; then echo "error: $1 needs a value" >&2; exit 2; fi ;;&
        --datalist) datalist=$2; rest+=("$1" "$2"); shift 2 ;;
        --output_dir) output=$2; shift 2 ;;
        --label | --model_path | --config_file)
            echo "error: $1 is set for each class here; leave it out (configs: CONFIG_FILE=...)" >&2; exit 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
if [ -z "$datalist" ] || [ -z "$output" ]; then
    echo "error: expected --datalist FILE --output_dir DIR, got neither or only one; name both" >&2
    exit 2
fi
classes=$("${PYTHON:-python}" - "$datalist" <<'CODE'
import re
import sys
from medgen.data import load_datalist
from medgen.errors import UserError
try:
    items, others = (load_datalist(sys.argv[1], split, require_files=False) for split in ("training", "validation"))
except UserError as error:
    sys.exit(f"error: {error}")
labels = sorted({str(item["label"]) for item in items if item.get("label") is not None})
if not labels:
    sys.exit(f"error: expected items with a label in {sys.argv[1]}, got none; add it")
for label in labels:
    if sum(str(item.get("label")) == label for item in others) < 2:
        sys.exit(f"error: expected 2 or more validation images of label {label} in {sys.argv[1]}, got fewer; split anew")
folders = {}
for label in labels:
    folder = "class_" + re.sub("[^A-Za-z0-9_-]", "_", label)
    if folder in folders:
        sys.exit(f"error: the labels {folders[folder]!r} and {label!r} would share the folder {folder}; rename one")
    folders[folder] = label
for folder, label in folders.items():
    print(folder, label)
CODE
)
while IFS= read -r class; do
    label=${class#* } folder="$output/${class%% *}"
    echo "class $label of $datalist: $folder"
    "${launcher[@]}" -m monai.bundle run --config_file "$CONFIG_FILE" "${rest[@]}" \
        --label "$label" --output_dir "$folder" --model_path "$folder/model.pt" </dev/null
done <<<"$classes"
