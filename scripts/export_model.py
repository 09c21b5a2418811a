"""Export a trained model to a folder that can be shared.

    python scripts/export_model.py runs/LHSC/checkpoint/model_best.pth.tar pretrained/mine

writes model.pth.tar (options and weights, in half precision), vocab.json and, with --projection,
the projection.npz of the features, which search.py needs. evaluation.py and search.py take the
folder's model.pth.tar and look for the other two beside it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import MODEL_OPTIONS, load_checkpoint, save_checkpoint
from evaluation import load
from utils import InputError, check_targets, one_line

MAX_HALF = torch.finfo(torch.float16).max  # 65,504: running variances can be larger
KEPT = MODEL_OPTIONS.keys() | {"data_name"}  # of the options; the others concern only training


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model_path", type=Path, metavar="CKPT")
    add("folder", type=Path)
    add("--projection", default=None, type=Path, help="the one given to extract_features.py")
    add("--vocab_path", default=None, help="folder of the vocabularies")
    opt = parser.parse_args()
    _, _, vocab = load(opt.model_path, argparse.Namespace(vocab_path=opt.vocab_path))
    checkpoint = load_checkpoint(opt.model_path)
    names = "epoch", "Eiters", "best_rsum", "vocab", "opt"
    if missing := [name for name in names if name not in checkpoint]:
        raise InputError(f"{opt.model_path}: holds no {', '.join(missing)}: not made by train.py")
    opt.folder.mkdir(parents=True, exist_ok=True)
    files = [opt.folder / name for name in ("model.pth.tar", "vocab.json", "projection.npz")]
    check_targets(*files)
    contents = {name: checkpoint[name] for name in names}
    contents["opt"] = {name: value for name, value in checkpoint["opt"].items() if name in KEPT}
    contents["model"] = {
        name: x.half() if x.is_floating_point() and x.abs().max() < MAX_HALF else x
        for name, x in checkpoint["model"].items()
    }
    save_checkpoint(contents, files[0])
    vocab.save(files[1])
    if opt.projection is not None:
        shutil.copyfile(opt.projection, files[2])
    size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    print(f"{opt.folder}: {size:.1f} MB, dev rsum {contents['best_rsum']:.1f} before rounding")


if __name__ == "__main__":
    main()
