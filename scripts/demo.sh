#!/usr/bin/env bash
# From a fresh clone to a trained LHSC and a picture of what it retrieves: makes the virtual
# environment .venv, draws the embedded data set, trains, evaluates, and draws the answers.
#   bash scripts/demo.sh
. "$(dirname "$0")/setup.sh" requirements.txt

run=runs/demo
python -W ignore scripts/make_scenes.py --out data --train 1200
python -W ignore train.py --data_name scenes_precomp --model_name $run/checkpoint \
  --logger_name $run/log --embed_size 128 --sim_dim 64 --word_dim 100 --batch_size 64 \
  --embed_dropout 0.1 --pool_dropout 0.1 --learning_rate 0.001 --warmup_epochs 2 \
  --num_epochs 10 --lr_update 8 --log_step 100 --val_step 100000
python -W ignore evaluation.py --model_path $run/checkpoint/model_best.pth.tar \
  --save_sims $run/sims.npy --save_metrics $run/metrics.json
python scripts/visualize.py retrieval --sims $run/sims.npy --data_name scenes_precomp \
  --pictures data/scenes_images/test --out $run/retrieval.png --overwrite
