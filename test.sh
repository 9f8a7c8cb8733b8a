#!/usr/bin/env bash
# Evaluate CvG-Diff: PSNR, SSIM and RMSE at each sparsity level. Edit the variables.
set -eu
CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")"

DATA=datasets/sample                 # test_img/ of HU .npy slices, or a folder of slices
CHECKPOINT=models/tiny.safetensors   # the shipped one, or OUT/checkpoint.safetensors of a training
OUT=results/sample                   # tables and figures
VIEWS="18 36 72"

. utils/environment.sh
echo "Evaluating $CHECKPOINT on $DATA at $VIEWS views into $OUT."
exec "$python" test.py --data "$DATA" --out "$OUT" --checkpoint "$CHECKPOINT" --views $VIEWS "$@"
