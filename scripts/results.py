"""The tables and figures of the results, made from the logs in results/.

    python scripts/results.py --write    # put them into README.md and results/README.md, draw fig/
    python scripts/results.py --check    # exit 1 if the tables in the files say something else

A table stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. ablations.py keeps the logs
of a run in results/SET/VARIANT-sSEED: metrics.jsonl of train.py, test.json of evaluation.py,
test-qb.json with QB-Norm (photographs), diagnosis.json of diagnose.py (drawn scenes). reproduce.sh
keeps those of the paper's experiments in results/paper/RUN. In results/flickr8k, cca.py writes
cca.json and cca-qb.json, and evaluation.py with two checkpoints writes ensemble.json and
ensemble-qb.json. benchmark.py writes results/speed/*.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import benchmark
from ablations import ENCODERS_OF, RECIPE_EPOCHS, SETS
from diagnose import KINDS
from visualize import curves_figure, plt, read_log

from utils import InputError, atomic_write, one_line, write_text

# Options that may differ between the seeds of a variant.
APART = {
    "seed", "data_path", "vocab_path", "model_name", "logger_name", "resume", "workers", "encoders",
}  # fmt: skip
# Steps of the paper's trainings: 50 epochs of 145,000 and 566,435 captions, 128 per batch.
PAPER = {"Flickr30K": 56_650, "MS-COCO": 221_300}
# The columns in README.md.
SHORT = ("model", "seeds", "i2t R@1", "t2i R@1", "test rsum", "with QB-Norm")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class Seed:
    """The logs of one run of a variant."""

    def __init__(self, folder: Path) -> None:
        self.log = read_log(folder)
        self.options = (self.log["run"] + self.log["resume"])[-1]["arguments"]
        files = (folder / name for name in ("test.json", "test-qb.json", "diagnosis.json"))
        self.test, qb_norm, self.diagnosis = (read_json(f) if f.is_file() else {} for f in files)
        self.qb_norm = qb_norm.get("rsum")
        self.dev = max(line["rsum"] for line in self.log["dev"])  # of the checkpoint tested
        seconds = statistics.median(line["batch_time"] for line in self.log["train"])
        self.minutes = self.log["train"][-1]["step"] * seconds / 60  # of steps, without validation
        self.epochs = self.log["dev"][-1]["epoch"] + 1


def read_set(name: str) -> dict[str, list[Seed]]:
    """The runs of a set of ablations.py, by the title of their variant.

    Raises InputError if the seeds of a variant differ in an option that both logs have, or if a
    run has no test.json.
    """
    found = {}
    for variant, (title, _) in SETS[name].variants.items():
        folders = sorted((ROOT / "results" / name).glob(f"{variant}-s[0-9]*"))
        seeds = [Seed(folder) for folder in folders]
        for folder, seed in zip(folders, seeds, strict=True):
            if "test.json" in SETS[name].tests and not seed.test:
                raise InputError(f"{folder}: no test.json; scripts/ablations.py makes it")
            first, other = seeds[0].options, seed.options
            for option in first.keys() & other.keys() - APART:
                if first[option] != other[option]:
                    raise InputError(f"{folder}: another seed has another --{option}")
            if variant in ENCODERS_OF:  # their training is a part of it
                encoders = Seed(folder.with_name(f"{ENCODERS_OF[variant]}-s{other['seed']}"))
                seed.minutes += encoders.minutes
                seed.epochs += encoders.epochs
        if seeds:
            found[title] = seeds
    return found


# -- tables ---------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, str]]) -> str:
    """A table; the keys of the rows are its columns."""
    if not rows:
        return "Not measured yet."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; for a single run only the value."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def cost(seeds: list[Seed]) -> dict[str, str]:
    first = seeds[0].log["run"][0]
    minutes = statistics.mean(seed.minutes for seed in seeds)
    return {"parameters": f"{first['parameters'] / 1e6:.2f} M", "training": f"{minutes:.1f} min",
            "on": first["hardware"]["device"]}  # fmt: skip


def recalls(title: str, tests: list[dict], dev: list[float]) -> dict[str, str]:
    """The metrics of one or several seeds; the interval's ends are means over the seeds."""
    low, high = map(statistics.mean, zip(*(t["bootstrap"]["rsum"] for t in tests), strict=True))
    return {
        "model": title, "seeds": str(len(tests)),
        "i2t R@1": spread([test["i2t"]["r1"] for test in tests]),
        "t2i R@1": spread([test["t2i"]["r1"] for test in tests]),
        "dev rsum": spread(dev), "test rsum": f"**{spread([test['rsum'] for test in tests])}**",
        "95 % interval": f"{low:.1f} – {high:.1f}",
    }  # fmt: skip


def untrained_row(name: str, title: str) -> list[dict[str, str]]:
    """A row from results/flickr8k/NAME.json and NAME-qb.json, which have no training log."""
    path = ROOT / f"results/flickr8k/{name}.json"
    if not path.is_file():
        return []
    test, qb_norm = read_json(path), read_json(path.with_name(f"{name}-qb.json"))["rsum"]
    columns = recalls(title, [test], [test["dev_rsum"]] if "dev_rsum" in test else [])
    columns |= {"seeds": "–", "with QB-Norm": spread([qb_norm]), "epochs": "–"}
    size = f"{test['parameters'] / 1e6:.2f} M" if "parameters" in test else "–"
    return [columns | {"parameters": size, "training": "–", "on": "–"}]


def photo_rows(photos: dict[str, list[Seed]]) -> list[dict[str, str]]:
    """Recalls on the test photographs: the linear baseline, the variants, the ensemble."""
    rows = untrained_row("cca", "linear CCA, mean region and words")
    for title, seeds in photos.items():
        columns = recalls(title, [seed.test for seed in seeds], [seed.dev for seed in seeds])
        columns["with QB-Norm"] = spread([seed.qb_norm for seed in seeds if seed.qb_norm])
        epochs = statistics.mean(seed.epochs for seed in seeds)
        rows.append(columns | {"epochs": f"{epochs:.0f}"} | cost(seeds))
    return rows + untrained_row("ensemble", "LHSC, `--recipe modern`, ensemble of two seeds")


def recipe_rows(photos: dict[str, list[Seed]]) -> list[dict[str, str]]:
    """VSE++ with the modern recipe, whole or without one part: best dev rsum in RECIPE_EPOCHS."""
    rows, parts = [], read_set("recipe")
    whole = photos.get(SETS["flickr8k"].variants["vse-modern"][0], []) if parts else []
    for title, seeds in ({"the whole recipe": whole} | parts).items():
        best = [
            max(line["rsum"] for line in seed.log["dev"] if line["epoch"] < RECIPE_EPOCHS)
            for seed in seeds
        ]
        if best:
            rows.append({"VSE++": title, "seeds": str(len(best)), "dev rsum": spread(best)})
    return rows


def scene_rows(scenes: dict[str, list[Seed]]) -> list[dict[str, str]]:
    """Accuracy on relations, attributes and counts: one row per variant."""
    return [
        {"model": title, "seeds": str(len(seeds))}
        | {kind: spread([seed.diagnosis[kind]["accuracy"] for seed in seeds]) for kind in KINDS}
        | {"test rsum": spread([seed.test["rsum"] for seed in seeds])} | cost(seeds)
        for title, seeds in scenes.items()
    ]  # fmt: skip


def paper_tables() -> str:
    """Measured runs of reproduce.sh, and how long a run takes at the measured time per step."""
    measured, steps = [], []
    for path in sorted((ROOT / "results/paper").glob("*/test*.json")):
        test, dev = read_json(path), max(line["rsum"] for line in read_log(path.parent)["dev"])
        measured.append(recalls(f"{path.parent.name}: {test['protocol']}", [test], [dev]))
    for path in sorted((ROOT / "results/speed").glob("*.json")):
        found = read_json(path)
        for step in found.get("training", []):
            if "batch 128, paper size" in step["what"] and "official" not in step["way"]:
                row = {"on": found["machine"]["device"], "precision": step["way"],
                       "a step": f"{step['seconds']:.2f} s"}  # fmt: skip
                for name, n in PAPER.items():
                    row[f"{name}, {n:,} steps"] = f"{n * step['seconds'] / 3600:,.0f} h"
                steps.append(row)
    return f"{markdown(measured)}\n\n{markdown(steps)}" if measured else markdown(steps)


def speed_tables() -> str:
    files = sorted((ROOT / "results/speed").glob("*.json"))
    return "\n\n".join(benchmark.markdown(read_json(file)) for file in files)


def scenes_figure(found: dict[str, list[Seed]]) -> plt.Figure:
    """Accuracy of each variant on each kind: a bar up to the mean, a dot per seed."""
    size = (12, 0.8 + 0.36 * len(found))
    fig, axes = plt.subplots(1, len(KINDS), figsize=size, sharey=True, layout="constrained")
    for ax, kind in zip(axes, KINDS, strict=True):
        for y, seeds in enumerate(found.values()):
            values = [seed.diagnosis[kind]["accuracy"] for seed in seeds]
            ax.barh(y, statistics.mean(values) - 50, left=50, height=0.5, color="#a9c6e3")
            ax.plot(values, [y] * len(values), "o", color="#1f4e79", ms=4)
        ax.axvline(50, color="grey", lw=1, ls=":")
        ax.set(title=kind, xlim=(45, 101), xlabel="accuracy (%)")
    axes[0].set_yticks(range(len(found)), [*found])
    axes[0].invert_yaxis()
    return fig


def save_figure(figure: plt.Figure, path: Path) -> None:
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


# -- the command line -----------------------------------------------------------------------------


def fill(text: str, name: str, table: str, where: Path) -> str:
    """`text` with the table between the markers of its name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"{where}: expected {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the tables and figures")
    what.add_argument("--check", action="store_true", help="compare the tables with the files")
    opt = parser.parse_args()
    photos, scenes = read_set("flickr8k"), read_set("scenes")
    rows = photo_rows(photos)
    short = [{column: row[column] for column in SHORT} for row in rows]
    long = {
        "flickr8k": markdown(rows), "recipe": markdown(recipe_rows(photos)),
        "scenes": markdown(scene_rows(scenes)),
    }  # fmt: skip
    tables = {
        ROOT / "README.md": {"results": markdown(short)},
        ROOT / "results/README.md": long | {"paper": paper_tables(), "speed": speed_tables()},
    }
    for path, by_name in tables.items():
        before = text = path.read_text(encoding="utf-8")
        for name, table in by_name.items():
            text = fill(text, name, table, path)
        if opt.check and text != before:
            print(f"{path}: its tables are not those of the logs: --write", file=sys.stderr)
            sys.exit(1)
        if opt.write:
            write_text(path, text)
    if opt.write:
        if photos:
            logs = {title.replace("`", ""): seeds[0].log for title, seeds in photos.items()}
            save_figure(curves_figure(logs), ROOT / "fig/flickr8k.png")
        if scenes:
            save_figure(scenes_figure(scenes), ROOT / "fig/scenes.png")


if __name__ == "__main__":
    main()
