#!/usr/bin/env bash
# `make demo BUNDLE=cxr_latent_diffusion`: from MIMIC-CXR's files to sampled, measured radiographs, on two CPU cores.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
out=$OUT/demo_diffusion
rm -rf "$out"

if [ -z "${DATALIST:-}" ]; then
    show "$PYTHON" -m medgen phantom mimic-cxr "$OUT/mimic" --patients 150 --size 128 --seed 1 --force
    prepare=("$PYTHON" -m preprocessing.mimic_cxr)
    dirs=(--source "$OUT/mimic" --target "$OUT/mimic_64")
    # exit code 3: some reports of the phantoms are missing or damaged on purpose; rejected.csv names them
    show "${prepare[@]}" organise "${dirs[@]}" --size 64 || [ $? = 3 ]
    show "${prepare[@]}" create_ids "${dirs[@]}" --split 0.8 0.1 0.1 || [ $? = 3 ]
    show "${prepare[@]}" sections "${dirs[@]}" || [ $? = 3 ]
    show "${prepare[@]}" sentences "${dirs[@]}" || [ $? = 3 ]
    DATALIST=$OUT/mimic_64/datalist.json
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST")
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi
# images without reports: a model without text
configs="'configs/demo.json'"
overlays=(configs/demo.json)
text=() prompts=()
if grep -qE '"(sentences|text)": *(\[ *)?"[^"]' "$DATALIST"; then
    show "$PYTHON" -m medgen phantom clip "$out/clip" --width 32
    text=(--text_encoder "$out/clip")
    export MEDGEN_TEXT_ENCODER=$out/clip # for a server, whose model comes without it
    prompts=(--prompts "['No acute cardiopulmonary process.','Large right pleural effusion.']")
else
    configs="$configs,'configs/unconditional.json'"
    overlays+=(configs/unconditional.json)
fi

train=("$PYTHON" -m monai.bundle run --config_file)
cd "$bundle/../cxr_autoencoder_kl"
show "${train[@]}" "['configs/train.json','configs/demo.json']" "${data[@]}" --channels "[32,32,64]" \
    --output_dir "$out/autoencoder" --model_path "$out/autoencoder/model.pt"

cd "$bundle"
show "${train[@]}" "['configs/encode.json',$configs]" "${data[@]}" \
    --autoencoder_path "$out/autoencoder/model.pt" --latents_dir "$out/latents"
show "${train[@]}" "['configs/train.json',$configs]" "${data[@]}" "${text[@]}" \
    --autoencoder_path "$out/autoencoder/model.pt" --latents_dir "$out/latents" \
    --output_dir "$out/training" --model_path "$out/training/model.pt" --tracking configs/tracking.json
show "${train[@]}" "['configs/inference.json',$configs]" "${text[@]}" --model_path "$out/training/model.pt" \
    "${prompts[@]}" --seeds 0-31 --output_dir "$out/generated"
show "${train[@]}" "['configs/evaluate.json',$configs]" "${data[@]}" --samples_dir "$out/generated" \
    --autoencoder_path "$out/training/autoencoder.pt" --output_dir "$out/evaluation"
report=("$PYTHON" -m medgen report "$out/generated/datalist.json" "$DATALIST" --output_dir "$out/report")
if [ -n "${DATASET_DIR:-}" ]; then report+=("${data[@]:2}"); fi
show "${report[@]}"
register cxr_latent_diffusion_demo "$out/training" "$out/evaluation/metrics.json" "frd<=15" "${overlays[@]}"
if [ -n "${MEDGEN_TEXT_ENCODER:-}" ]; then SERVE="MEDGEN_TEXT_ENCODER=$MEDGEN_TEXT_ENCODER $SERVE"; fi

cat <<TEXT

The demo is done. Its networks have seen minutes of training where real ones see days: blurred or smudged thoraces are what
to expect, and text that changes little. Look at
  training images above samples of the same seeds:  $out/training/images/samples_*.png
  samples, the upper half of the first prompt:      $out/generated/images/grid.png
  originals, reconstructions, difference:           $out/evaluation/images/test.png
  data, and beside it rejected.csv:                 $DATALIST
  figures with a real-against-real baseline:        $out/evaluation/metrics.json
  the report:                                       $out/report/report.html
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$out/training/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
TEXT
