#!/usr/bin/env bash
# F30K 1K of the run of train_f30k.sh. Options behind it are evaluation.py's.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python evaluation.py --model_path runs/f30k/checkpoint/model_best.pth.tar --split test \
  --save_metrics runs/f30k/test.json --bootstrap 1000 "$@"
