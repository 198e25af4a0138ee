#!/usr/bin/env bash
# `make demo BUNDLE=skin_sngan`: from the ISIC archive's JPEGs and table to melanomas that nobody has, on two CPU cores.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
out=$OUT/demo_skin
rm -rf "$out"

label=()
if [ -z "${DATALIST:-}" ]; then
    show "$PYTHON" -m medgen phantom isic "$OUT/isic" --patients 120 --size 64 --seed 1 --anomaly-fraction 0.6 --force
    show "$PYTHON" -m preprocessing.isic --source "$OUT/isic" --target "$OUT/isic_32" --size 32 --binary melanoma
    DATALIST=$OUT/isic_32/datalist.json
    label=(--label 1) # melanoma
    copies="
  pairs of images that are copies:             $OUT/isic_32/duplicates.csv"
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST" ${label[@]+"${label[@]}"})
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi

cd "$bundle"
run=("$PYTHON" -m monai.bundle run --config_file)
show "${run[@]}" "['configs/train.json','configs/demo.json']" "${data[@]}" \
    --output_dir "$out/training" --model_path "$out/training/model.pt" --tracking configs/tracking.json
show "${run[@]}" "['configs/inference.json','configs/demo.json']" --model_path "$out/training/model.pt" --seeds 0-63 \
    ${label[@]+"${label[@]}"} --output_dir "$out/generated"
show "${run[@]}" "['configs/evaluate.json','configs/demo.json']" "${data[@]}" --model_path "$out/training/model.pt" \
    --output_dir "$out/evaluation" --tracking configs/tracking.json
register skin_sngan_demo "$out/training" "$out/evaluation/metrics.json" "swd<=150" configs/demo.json

cat <<TEXT

The demo is done. Its network has seen twelve thousand images of 32 pixels: dark blots on skin are what to expect. Look at
  training images above generated ones:        $out/training/images/samples_*.png
  images of seeds 0 to 63:                     $out/generated/images/grid.png
  generated images above real ones:            $out/evaluation/images/samples_over_test.png
  figures with a real-against-real baseline:   $out/evaluation/metrics.json${copies:-}
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$out/training/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
TEXT
