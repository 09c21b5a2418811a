#!/usr/bin/env bash
# The paper's experiment on Flickr30K. Options behind it are train.py's:
#   bash scripts/train_f30k.sh --recipe modern --seed 1
set -euo pipefail
cd "$(dirname "$0")/.."
exec python train.py --data_name f30k_precomp --num_epochs 50 --lr_update 20 --batch_size 128 \
  --learning_rate 2e-4 --embed_size 1024 --sim_dim 256 --word_dim 300 --margin 0.2 \
  --model_name runs/f30k/checkpoint --logger_name runs/f30k/log "$@"
