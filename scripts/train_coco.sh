#!/usr/bin/env bash
# The paper's experiment on MS-COCO. Options behind it are train.py's:
#   bash scripts/train_coco.sh --recipe modern --seed 1
set -euo pipefail
cd "$(dirname "$0")/.."
exec python train.py --data_name coco_precomp --num_epochs 50 --lr_update 20 --batch_size 128 \
  --learning_rate 2e-4 --embed_size 1024 --sim_dim 256 --word_dim 300 --margin 0.2 \
  --model_name runs/coco/checkpoint --logger_name runs/coco/log "$@"
