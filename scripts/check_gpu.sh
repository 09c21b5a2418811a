#!/usr/bin/env bash
# All that needs a GPU, in one command. Needs torch, numpy and nltk; what else is missing is skipped.
#   bash scripts/check_gpu.sh
#   bash scripts/check_gpu.sh --device cpu   # to try this script; small sizes
# Leaves log.txt and JSON files in $OUT (runs/check_gpu): summary.json says what passed.
set -uo pipefail
cd "$(dirname "$0")/.."
[ ! -f .venv/bin/activate ] || . .venv/bin/activate
python=$(command -v python || command -v python3)
device=cuda out=${OUT:-runs/check_gpu} failed=0 lines=()
[ "${1:-}" != --device ] || device=${2:?"--device needs a name"}
mkdir -p "$out"
: >"$out/log.txt"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { # NAME COMMAND…: runs it, keeps its output, notes how it ended
  local name=$1 start=$SECONDS status=passed
  shift
  echo "== $name: $*" >>"$out/log.txt"
  "$@" >>"$out/log.txt" 2>&1 || { status=failed failed=1 && tail -n 5 "$out/log.txt"; }
  echo "$name: $status, $((SECONDS - start)) s"
  lines+=("{\"step\": \"$name\", \"status\": \"$status\", \"seconds\": $((SECONDS - start))}")
}
skip() { # NAME REASON
  echo "$1: skipped, $2"
  lines+=("{\"step\": \"$1\", \"status\": \"skipped\", \"reason\": \"$2\"}")
}
has() { "$python" -c "import $1" 2>/dev/null; }

device_tests=$(grep -l "mark.device" tests/test_*.py)
if has pytest && [ -n "$device_tests" ]; then
  TEST_DEVICE=$device step tests "$python" -m pytest -q -m device $device_tests
else
  skip tests "no pytest, or no tests that take a device"
fi

# Training steps in fp32, TF32 and bf16 are among the benchmark's figures.
quick=() n_train=800
[ "$device" != cpu ] || quick=(--quick) n_train=60
step benchmark "$python" -W ignore scripts/benchmark.py scoring training encoding processes \
  --device "$device" --json "$out/speed.json" "${quick[@]}"

cat >"$work/collectives.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist

sys.path.insert(0, ".")
from distributed import process_group

with process_group(torch.device(sys.argv[1])) as device:
    x = torch.arange(6.0, device=device)
    total, parts, objects = x.clone(), [torch.empty_like(x)], [None]
    dist.all_reduce(total)
    dist.all_gather(parts, x)
    dist.all_gather_object(objects, "here")
    assert torch.equal(total, x) and torch.equal(parts[0], x) and objects == ["here"]
    print(dist.get_backend())
PYTHON
step collectives "$python" -m torch.distributed.run --standalone --nproc_per_node 1 \
  "$work/collectives.py" "$device"

if has PIL; then
  data=scenes_precomp
  step data "$python" scripts/make_scenes.py --out "$work" --train $n_train --dev 40 --test 40
else
  data=random_precomp
  skip scenes "no pillow: random regions instead"
  step data "$python" - "$work/$data" $n_train <<'PYTHON'
import sys
from pathlib import Path

import numpy as np

folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
folder.mkdir(parents=True)
for split, n in (("train", int(sys.argv[2])), ("dev", 40), ("test", 40)):
    np.save(folder / f"{split}_ims.npy", rng.random((n, 36, 64), dtype=np.float32))
    captions = "".join(f"picture {k // 5 % 20} caption {k % 5}\n" for k in range(5 * n))
    (folder / f"{split}_caps.txt").write_text(captions)
PYTHON
fi
for precision in fp32 bf16; do
  step "train_$precision" "$python" -W ignore train.py --device "$device" --precision $precision \
    --data_path "$work" --vocab_path "$work" --data_name "$data" --embed_size 128 --sim_dim 64 \
    --num_epochs 2 --warmup_epochs 1 --learning_rate 1e-3 --log_step 10 \
    --model_name "$work/$precision/checkpoint" --logger_name "$work/$precision/log"
  step "evaluate_$precision" "$python" -W ignore evaluation.py --device "$device" \
    --model_path "$work/$precision/checkpoint/model_best.pth.tar" --precision $precision \
    --save_metrics "$out/test_$precision.json"
done

(IFS=,; printf '{"device": "%s", "steps": [%s]}\n' "$device" "${lines[*]}") >"$out/summary.json"
echo "$out/summary.json"
exit $failed
