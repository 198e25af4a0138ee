#!/usr/bin/env bash
# `make demo BUNDLE=cxr_inversion_encoder`: a generator, its encoder in three stages, and the four applications.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
out=$OUT/demo_inversion
rm -rf "$out"
run=("$PYTHON" -m monai.bundle run --config_file)

if [ -z "${DATALIST:-}" ]; then
    show "$PYTHON" -m medgen phantom chestxray14 "$OUT/inversion_phantoms" --patients 150 --size 128 --seed 5 --force
    show "$PYTHON" -m preprocessing.chestxray14 --source "$OUT/inversion_phantoms" --target "$OUT/inversion_32" --size 32
    DATALIST=$OUT/inversion_32/datalist.json
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST")
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi

# a generator to invert
cd "$bundle/../cxr_pggan"
show "${run[@]}" "['configs/train.json','configs/demo.json']" "${data[@]}" \
    --output_dir "$out/generator" --model_path "$out/generator/model.pt"

cd "$bundle"
generator=(--generator_weights "$out/generator/model.pt")
# stage 1: images that the generator draws, whose latents are known
show "${run[@]}" "['configs/train_bootstrap.json','configs/demo.json']" "${generator[@]}" \
    --output_dir "$out/bootstrap" --model_path "$out/bootstrap/bootstrap.pt" --tracking configs/tracking.json
show "${run[@]}" "['configs/evaluate_bootstrap.json','configs/demo.json']" "${generator[@]}" \
    --model_path "$out/bootstrap/bootstrap.pt" --output_dir "$out/synthetic"
# stage 2: real images
show "${run[@]}" "['configs/train.json','configs/demo.json']" "${data[@]}" "${generator[@]}" \
    --initial_weights "$out/bootstrap/bootstrap.pt" --output_dir "$out/training" --model_path "$out/training/model.pt" \
    --tracking configs/tracking.json
model=(--model_path "$out/training/model.pt" "${generator[@]}")
show "${run[@]}" "['configs/evaluate.json','configs/demo.json']" "${data[@]}" "${model[@]}" --output_dir "$out/evaluation" \
    --tracking configs/tracking.json
# all images at once: latents, reconstructions, errors
show "${run[@]}" "['configs/inference.json','configs/demo.json']" "${data[@]}" "${model[@]}" --split all \
    --output_dir "$out/encoded"
# stage 3: each image by itself
show "${run[@]}" "['configs/optimise.json','configs/demo.json']" "${data[@]}" "${model[@]}" --split test \
    --steps 100 --output_dir "$out/optimised"

# what latents are good for
show "${run[@]}" "['configs/compress.json','configs/demo.json']" "${data[@]}" "${generator[@]}" \
    --embedding "$out/optimised/embedding" --output_dir "$out/compression"
show "${run[@]}" "['configs/disentangle.json','configs/demo.json']" "${generator[@]}" \
    --embedding "$out/encoded/embedding" --output_dir "$out/factors"
show "${run[@]}" "['configs/manipulate.json','configs/demo.json']" "${generator[@]}" \
    --embedding "$out/encoded/embedding" --directions "$out/factors/directions.safetensors" --direction sex \
    --images 0,1,2 --output_dir "$out/manipulated"
show "${run[@]}" "['configs/stylise.json','configs/demo.json']" "${generator[@]}" --mode interpolate \
    --embedding "$out/optimised/embedding" --images 0,1 --output_dir "$out/between"
show "${run[@]}" "['configs/stylise.json','configs/demo.json']" "${generator[@]}" --mode around \
    --embedding "$out/optimised/embedding" --images 0 --seeds 0-15 --output_dir "$out/around"
register cxr_inversion_encoder_demo "$out/training" "$out/evaluation/metrics.json" "psnr>=18" configs/demo.json

cat <<TEXT

The demo is done. Its generator has seen twelve thousand images of 32 pixels and its encoder some eighteen thousand: blurred
thoraces are what to expect. Look at
  synthetic images, and what their latents' estimates draw:  $out/synthetic/images/test.png
  real images, reconstructions, differences:                 $out/evaluation/images/test.png
  the same before and after optimisation:                    $out/optimised/images/
  latents against JPEG and JPEG 2000:                        $out/compression/images/
  a map of the latents, to open in a browser:                $out/factors/map.html
  directions of labels, and unsupervised ones:               $out/factors/images/directions.png
  images moved along the direction of sex:                   $out/manipulated/images/
  a walk from patient to patient:                            $out/between/images/interpolation.gif
  samples around a patient:                                  $out/around/images/around.png
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$out/training/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
TEXT
