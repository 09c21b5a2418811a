"""What each part is worth: trains the variants of LHSC, and what it is compared with, alike.

    python scripts/ablations.py flickr8k --data_path data             # all of them, one by one
    python scripts/ablations.py scenes --only lhsc saf --seeds 0 --jobs 2
    python scripts/ablations.py flickr8k --list                       # the commands

Each run is a call of train.py, evaluation.py and, on the drawn scenes, diagnose.py, under --runs.
What they log is copied to results/SET/VARIANT-sSEED; scripts/results.py makes the README's tables
and plots of that. A run whose logs are there is left out, so a call that was stopped goes on where
it was (a training in its middle with --resume).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from errors import InputError, one_line


class Variant(NamedTuple):
    title: str
    options: str = ""  # what it changes in the command of its set


VARIANTS = {
    "lhsc": Variant("LHSC"),
    "released": Variant("LHSC, released padding", "--padding released --val_captions 5000"),
    "attended": Variant("LHSC, global vector of attended regions", "--global_image attended"),
    "local": Variant("LHSC, local alignments only", "--alignment local"),
    "global": Variant("LHSC, global alignment only", "--alignment global"),
    "six-layers": Variant("six graph, six word layers", "--graph_layers 6 --text_layers 6"),
    "two-layers": Variant("two graph, two word layers", "--graph_layers 2 --text_layers 2"),
    "one-layer": Variant("one graph, one word layer", "--graph_layers 1 --text_layers 1"),
    "graph-only": Variant("graph layers only", "--text_layers 0"),
    "words-only": Variant("word layers only", "--graph_layers 0"),
    "saf": Variant("SAF (no graph, no word layers)", "--graph_layers 0 --text_layers 0"),
    "scan": Variant("SCAN, text to image", "--similarity scan --graph_layers 0 --text_layers 0"),
    "vse": Variant("VSE++", "--similarity vse --graph_layers 0 --text_layers 0"),
    "long": Variant("LHSC, 12 epochs", "--num_epochs 12 --lr_update 8"),
    "modern": Variant("LHSC, `--recipe modern`", "--recipe modern"),
    "modern-long": Variant("LHSC, `--recipe modern`, 12 epochs", "--recipe modern --num_epochs 12"),
    "ema": Variant("LHSC, averaged weights", "--ema 0.999"),
    "cosine": Variant("LHSC, cosine schedule", "--lr_schedule cosine --lr_warmup 100"),
    "label-safe": Variant("LHSC, same image no negative", "--same_image ignored"),
    "decay": Variant("LHSC, weight decay", "--weight_decay 0.1"),
    "bf16": Variant("LHSC, `--precision bf16`", "--precision bf16"),
    "batch": Variant(
        "LHSC, batch 64, five epochs",
        "--batch_size 64 --learning_rate 1.4e-3 --num_epochs 5 --lr_update 3",
    ),
}


class Set(NamedTuple):
    """Runs on one data set: equal sizes, epochs and options but for what a variant changes."""

    common: str
    variants: dict[str, tuple[int, ...]]  # and their seeds
    diagnose: bool = False  # on the drawn scenes: relations, attributes, counts


THREE = (0, 1, 2)
MODELS, RECIPES = ("lhsc", "released", "saf", "scan", "vse"), ("long", "modern", "modern-long")
FLICKR8K = dict.fromkeys((*MODELS, *RECIPES), THREE)
ONE_PART = ("ema", "cosine", "label-safe", "decay", "bf16", "batch")  # tried for --recipe modern
FLICKR8K |= dict.fromkeys(ONE_PART, (0,))
LAYERS, ALIGNMENTS = ("one-layer", "graph-only", "words-only"), ("attended", "local", "global")
SCENES = dict.fromkeys(("lhsc", *LAYERS, "saf", *ALIGNMENTS, "scan", "vse"), THREE)
SETS = {
    "flickr8k": Set(
        "--data_name f8k_precomp --embed_size 128 --sim_dim 32 --word_dim 100 --batch_size 32 "
        "--embed_dropout 0.2 --pool_dropout 0.2 --learning_rate 1e-3 --warmup_epochs 2 "
        "--num_epochs 6 --lr_update 4",
        FLICKR8K,
    ),
    "scenes": Set(
        "--data_name scenes_precomp --embed_size 128 --sim_dim 64 --word_dim 100 --batch_size 64 "
        "--embed_dropout 0.1 --pool_dropout 0.1 --learning_rate 1e-3 --warmup_epochs 2 "
        "--num_epochs 10 --lr_update 8",
        SCENES,
        diagnose=True,
    ),
}
QUIET = "--workers 0 --log_step 100 --val_step 1000000 --save_step 1000000"


class Run(NamedTuple):
    set_name: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-s{self.seed}"

    def folder(self, runs: Path) -> Path:
        return runs / self.set_name / self.name

    def commands(self, opt: argparse.Namespace) -> list[list[str]]:
        """Of training, evaluation and diagnosis."""
        a_set, folder = SETS[self.set_name], self.folder(opt.runs)
        where = ["--data_path", str(opt.data_path), "--vocab_path", str(opt.vocab_path)]
        best = ["--model_path", str(folder / "checkpoint" / "model_best.pth.tar")]
        options = f"{a_set.common} {VARIANTS[self.variant].options} {QUIET}"
        train = [
            "train.py", *shlex.split(options), *where,
            "--seed", str(self.seed), "--model_name", str(folder / "checkpoint"),
            "--logger_name", str(folder / "log"),
        ]  # fmt: skip
        if any((folder / "checkpoint").glob("checkpoint_*.pth.tar")):
            train += ["--resume", str(folder / "checkpoint")]
        test = ["--bootstrap", "1000", "--save_metrics", str(folder / "test.json")]
        commands = [train, ["evaluation.py", *best, *where, *test]]
        if a_set.diagnose:
            to = ["--json", str(folder / "diagnosis.json")]
            commands.append(["scripts/diagnose.py", *best, *where, *to])
        return [[sys.executable, "-W", "ignore", str(ROOT / script), *others]
                for script, *others in commands]  # fmt: skip

    def logs(self, runs: Path) -> list[Path]:
        folder = self.folder(runs)
        names = ["checkpoint/metrics.jsonl", "test.json"]
        names += ["diagnosis.json"] * SETS[self.set_name].diagnose
        return [folder / name for name in names]


def carry_out(run: Run, opt: argparse.Namespace) -> bool:
    """Train, evaluate, and keep the logs; False if one of the commands failed."""
    folder, kept = run.folder(opt.runs), opt.results / run.set_name / run.name
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if opt.jobs > 1 else {})
    with (folder / "output.txt").open("a", encoding="utf-8") as output:
        for command in run.commands(opt):
            print(f"{run.set_name}/{run.name}: {Path(command[3]).name}", flush=True)
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            )
            if done.returncode:
                print(f"{run.set_name}/{run.name}: failed, see {folder / 'output.txt'}",
                      file=sys.stderr, flush=True)  # fmt: skip
                return False
    kept.mkdir(parents=True, exist_ok=True)
    for log in run.logs(opt.runs):
        shutil.copy(log, kept / log.name)
    return True


def is_kept(run: Run, opt: argparse.Namespace) -> bool:
    """Whether all logs of a run are in the results."""
    kept = opt.results / run.set_name / run.name
    return all((kept / log.name).is_file() for log in run.logs(opt.runs))


def wanted(opt: argparse.Namespace) -> list[Run]:
    """The runs asked for, seed by seed.

    Raises:
        InputError: for a variant there is not.
    """
    if unknown := set(opt.only or ()) - VARIANTS.keys():
        raise InputError(f"--only {min(unknown)}: there are {', '.join(VARIANTS)}")
    variants = SETS[opt.set].variants
    if opt.only:
        variants = {name: variants.get(name, THREE) for name in opt.only}
    seeds = sorted({seed for own in variants.values() for seed in own})
    return [
        Run(opt.set, name, seed)
        for seed in (seeds if opt.seeds is None else opt.seeds)
        for name, own in variants.items()
        if opt.seeds is not None or seed in own
    ]


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("set", choices=[*SETS])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of those of the set")
    parser.add_argument(
        "--jobs", default=1, type=int, help="at once, of one thread each if several"
    )
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    parser.add_argument("--data_path", default=Path("data"), type=Path)
    parser.add_argument("--vocab_path", default=Path("vocab"), type=Path)
    parser.add_argument("--runs", default=Path("runs/ablations"), type=Path, help="checkpoints")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="their logs")
    opt = parser.parse_args()
    runs = [run for run in wanted(opt) if not is_kept(run, opt)]
    if opt.list:
        for run in runs:
            print(*(shlex.join(command[3:]) for command in run.commands(opt)), sep="\n")
        return
    with ThreadPoolExecutor(max(1, opt.jobs)) as pool:
        results = list(pool.map(lambda run: carry_out(run, opt), runs))
    print(f"{sum(results)} of {len(results)} runs done; python scripts/results.py --write")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
