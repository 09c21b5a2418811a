"""Train, evaluate and log the variants in results/README.md: equal conditions, three seeds.

    python scripts/ablations.py flickr8k --data_path data             # all of them, one by one
    python scripts/ablations.py scenes --only lhsc saf --seeds 0 --jobs 2
    python scripts/ablations.py flickr8k --list                       # print the commands

A run calls train.py, then evaluation.py on the checkpoint with the best dev rsum; on the drawn
scenes also diagnose.py. Checkpoints go to --runs, logs are copied to results/SET/VARIANT-sSEED.
The set `recipe` leaves out one part of --recipe modern at a time, and is compared only on dev.
Runs whose logs exist are skipped, and an interrupted training is continued (--resume).
scripts/results.py makes the tables and figures.
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
from utils import InputError, at_least, one_line


class Set(NamedTuple):
    """Runs on one data set that differ only in what a variant changes."""

    common: str  # options of all its trainings
    variants: dict[str, tuple[str, str]]  # a title and the options that it changes
    tests: dict[str, str]  # a file of results/, and the command that makes it from the checkpoint


TEST = "evaluation.py --bootstrap 1000 --save_metrics"
QB_TEST = "evaluation.py --qb_norm 20 --bootstrap 1000 --save_metrics"
RECIPE_EPOCHS = 15  # of each run of the set `recipe`
NO_LAYERS = "--graph_layers 0 --text_layers 0"
MODERN = "--recipe modern --word_dim 100 --word_vectors data/word_vectors.txt"
WARM = "--learning_rate 5e-4 --warmup_epochs 2"
BASELINES = {
    "saf": ("SAF (no graph, no word layers)", NO_LAYERS),
    "scan": ("SCAN, text to image", f"{NO_LAYERS} --similarity scan"),
    "vse": ("VSE++", f"{NO_LAYERS} --similarity vse"),
}
FLICKR8K = "--data_name f8k_precomp --embed_size 256 --sim_dim 64 --batch_size 128"
VSE_MODERN = f"{NO_LAYERS} {MODERN} --similarity vse"
SETS = {
    "flickr8k": Set(
        f"{FLICKR8K} --patience 5",
        {name: (title, f"{options} {WARM}") for name, (title, options) in BASELINES.items()}
        | {
            "lhsc": ("LHSC, official recipe", ""),
            "official-padding": ("LHSC, official recipe and padding", "--padding official"),
            "warm": ("LHSC, official recipe with a warm-up", WARM),
            "vse-modern": ("VSE++, `--recipe modern`", VSE_MODERN),
            "scan-modern": ("SCAN, `--recipe modern`", f"{NO_LAYERS} {MODERN} --similarity scan"),
            "saf-modern": ("SAF, `--recipe modern`", f"{NO_LAYERS} {MODERN}"),
            "modern": ("LHSC, `--recipe modern`", MODERN),
        },
        {"test.json": TEST, "test-qb.json": QB_TEST},
    ),
    "recipe": Set(
        f"{FLICKR8K} {VSE_MODERN} --num_epochs {RECIPE_EPOCHS}",
        {
            "size": ("without size augmentation", "--size_augmentation 0"),
            "dropout": ("without feature dropout", "--feature_dropout 0"),
            "ema": ("without averaged weights", "--ema 0"),
            "vectors": ("without word vectors", "--word_vectors="),
            "warmup": ("without learning-rate warm-up", "--lr_warmup 0"),
        },
        {},
    ),
    "scenes": Set(
        "--data_name scenes_precomp --embed_size 128 --sim_dim 64 --word_dim 100 --batch_size 64 "
        "--embed_dropout 0.1 --pool_dropout 0.1 --learning_rate 1e-3 --warmup_epochs 2 "
        "--num_epochs 10 --lr_update 8",
        {
            "lhsc": ("LHSC", ""),
            "attended": ("LHSC, global vector of attended regions", "--similarity attended"),
            "local": ("LHSC, local alignments only", "--similarity local"),
            "global": ("LHSC, global alignment only", "--similarity global"),
            "one-layer": ("one graph, one word layer", "--graph_layers 1 --text_layers 1"),
            "graph-only": ("graph layers only", "--text_layers 0"),
            "words-only": ("word layers only", "--graph_layers 0"),
        }
        | BASELINES,
        {"test.json": TEST, "diagnosis.json": "scripts/diagnose.py --json"},
    ),
}
# Variants whose encoders are those of another variant, which has to be trained before.
ENCODERS_OF = {"saf-modern": "scan-modern", "modern": "scan-modern"}
QUIET = "--workers 0 --log_step 100 --val_step 1000000 --save_step 1000000"  # once per epoch


class Run(NamedTuple):
    set_name: str
    variant: str
    seed: int

    def folder(self, parent: Path) -> Path:
        return parent / self.set_name / f"{self.variant}-s{self.seed}"

    def encoders(self) -> Run | None:
        """The run whose encoders this one takes."""
        variant = ENCODERS_OF.get(self.variant)
        return self._replace(variant=variant) if variant else None

    def commands(self, opt: argparse.Namespace) -> list[list[str]]:
        """The training, and the tests of its checkpoint."""
        a_set, folder = SETS[self.set_name], self.folder(opt.runs)
        checkpoints = folder / "checkpoint"
        where = ["--data_path", opt.data_path, "--vocab_path", opt.vocab_path]
        best = ["--model_path", checkpoints / "model_best.pth.tar", *where]
        options = f"{a_set.common} {a_set.variants[self.variant][1]} {QUIET} --seed {self.seed}"
        train = ["train.py", *where, *options.split(), "--model_name", checkpoints]
        train += ["--logger_name", folder / "log"]
        if trained := self.encoders():
            train += ["--encoders", trained.folder(opt.runs) / "checkpoint/model_best.pth.tar"]
        if any(checkpoints.glob("checkpoint_*.pth.tar")):
            train.append("--resume")
        tests = ([*test.split(), folder / file, *best] for file, test in a_set.tests.items())
        return [list(map(str, command)) for command in (train, *tests)]

    def logs(self, opt: argparse.Namespace) -> dict[Path, Path]:
        """Each log in --runs, and where it is kept."""
        made, kept = self.folder(opt.runs), self.folder(opt.results)
        logs = {made / "checkpoint/metrics.jsonl": kept / "metrics.jsonl"}
        return logs | {made / file: kept / file for file in SETS[self.set_name].tests}

    def carry_out(self, opt: argparse.Namespace) -> bool:
        """Train, evaluate and keep the logs; False if one of the commands failed."""
        folder, name = self.folder(opt.runs), self.folder(Path())
        if (first := self.encoders()) and not all(made.is_file() for made in first.logs(opt)):
            print(f"{name}: needs {first.folder(opt.runs)}, not done yet", file=sys.stderr)
            return False
        folder.mkdir(parents=True, exist_ok=True)
        one_thread = {"OMP_NUM_THREADS": "1"} if opt.jobs > 1 else {}
        with (folder / "output.txt").open("a", encoding="utf-8") as output:
            for script, *options in self.commands(opt):
                print(f"{name}: {script}", flush=True)
                command = [sys.executable, "-W", "ignore", str(ROOT / script), *options]
                done = subprocess.run(
                    command, stdout=output, stderr=output, env=os.environ | one_thread, check=False
                )
                if done.returncode:
                    print(f"{name}: failed, see {output.name}", file=sys.stderr, flush=True)
                    return False
        for made, kept in self.logs(opt).items():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, kept)
        return True


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("set", choices=[*SETS])
    add("--only", nargs="+", metavar="VARIANT", help="only these variants of the set")
    add("--seeds", nargs="+", default=[0, 1, 2], type=at_least(0))
    add("--jobs", default=1, type=at_least(1), help="runs in parallel, with one thread each")
    add("--list", action="store_true", help="only print the commands")
    add("--data_path", default=Path("data"), type=Path)
    add("--vocab_path", default=Path("vocab"), type=Path)
    add("--runs", default=Path("runs/ablations"), type=Path, help="folder for checkpoints")
    add("--results", default=ROOT / "results", type=Path, help="folder for the logs")
    opt = parser.parse_args()
    variants = SETS[opt.set].variants
    if unknown := set(opt.only or ()) - variants.keys():
        raise InputError(f"--only {min(unknown)}: {opt.set} has {', '.join(variants)}")
    runs = [Run(opt.set, name, seed) for seed in opt.seeds for name in opt.only or variants]
    runs = [run for run in runs if not all(kept.is_file() for kept in run.logs(opt).values())]
    runs.sort(key=lambda run: run.variant in ENCODERS_OF)
    if opt.list:
        for run in runs:
            print(*(f"python {shlex.join(command)}" for command in run.commands(opt)), sep="\n")
        return
    done = []
    with ThreadPoolExecutor(opt.jobs) as pool:
        for later in (False, True):  # a variant that takes another's encoders waits for all others
            now = [run for run in runs if (run.variant in ENCODERS_OF) == later]
            done += pool.map(lambda run: run.carry_out(opt), now)
    print(f"{sum(done)} of {len(done)} runs done; python scripts/results.py --write")
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
