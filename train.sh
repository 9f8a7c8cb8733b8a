#!/usr/bin/env bash
# Train CvG-Diff. Edit the variables; run the same command again to resume.
set -eu
CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")"

PRESET=tiny              # a row of models/presets.py: tiny (CPU) | small, base (GPU) | paper (the published recipe)
DATA=datasets/sample     # train_img/ and val_img/ of HU .npy slices, or one folder of slices
OUT=runs/$PRESET         # checkpoints and curves
IMAGES=                  # training images to see in all (empty: the preset's)
SEED=3407
GPUS=1                   # more than one: a process for each, which share every batch
FLAGS=                   # more of train.py: --augment, flips and turns; --init models/tiny.safetensors for preset real

. utils/environment.sh
echo "Training $PRESET on $DATA into $OUT (stop with Ctrl-C; run again to resume)."
[ "$GPUS" -gt 1 ] && launch="-m torch.distributed.run --standalone --nproc-per-node $GPUS" || launch=
exec "$python" $launch train.py --preset "$PRESET" --data "$DATA" --out "$OUT" --seed "$SEED" \
    ${IMAGES:+--images "$IMAGES"} $FLAGS "$@"
