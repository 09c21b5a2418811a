#!/usr/bin/env bash
# COCO 1K (five folds), then COCO 5K, of the run of train_coco.sh. Options behind it are
# evaluation.py's.
set -euo pipefail
cd "$(dirname "$0")/.."
model=runs/coco/checkpoint/model_best.pth.tar
python evaluation.py --model_path $model --split testall --fold5 \
  --save_metrics runs/coco/test_1k.json --bootstrap 1000 "$@"
exec python evaluation.py --model_path $model --split testall \
  --save_metrics runs/coco/test_5k.json --bootstrap 1000 "$@"
