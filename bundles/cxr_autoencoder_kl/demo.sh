#!/usr/bin/env bash
# `make demo`: from DICOM files to a registered model, on two CPU cores in a few minutes.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
rm -rf "$OUT/demo_training"

if [ -z "${DATALIST:-}" ]; then
    show "$PYTHON" -m medgen phantom chest "$OUT/phantoms" --patients 60 --size 256 --seed 1 --force
    show "$PYTHON" -m preprocessing.images --source "$OUT/phantoms/images" --target "$OUT/preprocessed" --size 64
    DATALIST=$OUT/preprocessed/datalist.json
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST")
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi

cd "$bundle"
run=(--output_dir "$OUT/demo_training" --model_path "$OUT/demo_training/model.pt" --tracking configs/tracking.json)
show "$PYTHON" -m monai.bundle run --config_file "['configs/train.json','configs/demo.json']" "${data[@]}" "${run[@]}"
show "$PYTHON" -m monai.bundle run --config_file "['configs/evaluate.json','configs/demo.json']" "${data[@]}" "${run[@]}"
register cxr_autoencoder_kl_demo "$OUT/demo_training" "$OUT/demo_training/metrics.json" "psnr>=18" configs/demo.json

cat <<TEXT

The demo is done. Its small network has seen each image sixty times: blurred is what to expect. Look at
  originals above reconstructions above their difference:  $OUT/demo_training/images/test.png
  figures of the test split:                               $OUT/demo_training/metrics.json
  weights:                                                 $OUT/demo_training/model.pt
  data:                                                    $DATALIST
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$OUT/demo_training/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
TEXT
