#!/usr/bin/env bash
# An experiment of the paper: data, training, evaluation, a row of results/README.md.
#   bash scripts/reproduce.sh f30k           # Flickr30K: 9.2 GB of data; F30K 1K
#   bash scripts/reproduce.sh coco --seed 1  # MS-COCO: 36.7 GB; COCO 1K (five folds) and COCO 5K
#   bash scripts/reproduce.sh NAME           # your own data in data/NAME, in the same layout
# Further options are train.py's; a run with --seed N is called f30k-sN. Started again, it fetches
# and trains only what is missing. On four GPUs: LAUNCH='torchrun --nproc_per_node 4' bash …
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -f .venv/bin/activate ] || . .venv/bin/activate
[ $# -gt 0 ] && [[ "$1" != -* ]] || {
  echo "error: name the data: bash scripts/reproduce.sh f30k (or coco, or a folder in data)" >&2
  exit 2
}
name=$1 run=$1 places=()
shift
options=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    --data_path | --vocab_path) places+=("$1" "${2:-}") ;;
    --data_path=* | --vocab_path=*) places+=("$1") ;;
    --seed) run="$name-s${2:-}" ;;
    --seed=*) run="$name-s${1#*=}" ;;
  esac
  shift
done

case $name in
  f30k | coco)
    data=${name}_precomp
    python scripts/download_data.py --data_name "$data" --check "${places[@]}" ||
      python scripts/download_data.py --data_name "$data" "${places[@]}"
    ;;
  *) data=$name ;;
esac

checkpoint=runs/$run/checkpoint
train=(--data_name "$data" --model_name "$checkpoint" --logger_name "runs/$run/log"
  --num_epochs 50 --lr_update 20 "${options[@]}")
[ -z "$(compgen -G "$checkpoint/checkpoint_*")" ] || train+=(--resume)
${LAUNCH:-python} train.py "${train[@]}"

results=results/paper/$run
mkdir -p "$results"
cp "$checkpoint/metrics.jsonl" "$results"
evaluate() { # FILE, then options of evaluation.py
  ${LAUNCH:-python} evaluation.py --model_path "$checkpoint/model_best.pth.tar" "${places[@]}" \
    --bootstrap 1000 --save_metrics "$results/$1" "${@:2}"
}
if [ "$name" = coco ]; then
  evaluate test_1k.json --split testall --fold5
  evaluate test_5k.json --split testall
else
  evaluate test.json
fi
python scripts/results.py --write
echo "$results: metrics.jsonl and the evaluation, for results/README.md"
