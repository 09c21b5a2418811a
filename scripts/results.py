"""The README's tables and plots of results, speed, search and several processes, made from logs.

    python scripts/results.py            # print the tables
    python scripts/results.py --write    # put them into the README, and draw fig/
    python scripts/results.py --check    # exit 1 if the README says something else

A run is a folder that holds `metrics.jsonl` (as train.py wrote it) and `test.json` (as
`evaluation.py --save_metrics` wrote it): one row each of those in `results/`, one row a variant of
those that ablations.py put into `results/flickr8k/` and `results/scenes/`. A file of
`results/speed/` is what `benchmark.py --json` wrote on one machine; of `results/search/` and
`results/distributed/`, `benchmark_search.py --json` and `benchmark_distributed.py --json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import ablations
import benchmark
import benchmark_distributed
import benchmark_search
import diagnose
import plan

from errors import InputError, one_line
from train import options

DEFAULTS = vars(options().parse_args([]))

HEAD = (
    "| run | protocol | i2t R@1 / 5 / 10 | t2i R@1 / 5 / 10 | rsum | best dev rsum "
    "| epochs, training | machine | seed |\n|---|---|---|---|---|---|---|---|---|"
)


def read_run(folder: Path) -> tuple[dict, list[dict], dict]:
    """A run's first line, its other lines, and its metrics on test.

    Raises:
        InputError: if a file is missing or is not what train.py and evaluation.py write.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        run, *others = [json.loads(line) for line in lines]
        test = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {error}") from error
    if run.get("type") != "run" or not {"i2t", "t2i", "rsum", "protocol"} <= test.keys():
        raise InputError(f"{folder}: not the logs of train.py and evaluation.py")
    return run, others, test


def training_hours(lines: list[dict]) -> float:
    """Hours of training steps, each taken to last as long as the median one; no validation.

    (The median, because a machine that slept in between would count its sleep.)
    """
    train = [line for line in lines if line["type"] == "train"]
    return train[-1]["step"] * statistics.median(line["batch_time"] for line in train) / 3600


def row(folder: Path) -> str:
    run, lines, test = read_run(folder)
    recalls = [
        " / ".join(f"{test[way][name]:.1f}" for name in ("r1", "r5", "r10"))
        for way in ("i2t", "t2i")
    ]
    dev = max(line["rsum"] for line in lines if line["type"] == "dev")
    hardware = run["hardware"]
    epochs = max(line["epoch"] for line in lines) + 1
    cells = [
        folder.name, test["protocol"], *recalls, f"**{test['rsum']:.1f}**", f"{dev:.1f}",
        f"{epochs}, {training_hours(lines):.1f} h",
        f"{hardware['device']}, {hardware['threads']} threads", str(run["seed"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(folder: Path) -> str:
    runs = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    if not runs:
        raise InputError(f"{folder}: no runs here (folders with metrics.jsonl and test.json)")
    return "\n".join([HEAD, *map(row, runs)])


# -- variants, each with some seeds ---------------------------------------------------------------


class Seed(NamedTuple):
    """One run of a variant."""

    folder: Path
    run: dict
    lines: list[dict]
    test: dict

    @property
    def dev(self) -> float:
        """Of the checkpoint that was tested."""
        return max(line["rsum"] for line in self.lines if line["type"] == "dev")

    def diagnosis(self) -> dict:
        path = self.folder / "diagnosis.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {error}") from error


def variants(folder: Path) -> dict[str, list[Seed]]:
    """The runs of ablations.py, in its order.

    Raises:
        InputError: if there are none, or those of a variant differ in more than their seed.
    """
    found = {
        name: [Seed(path, *read_run(path)) for path in sorted(folder.glob(f"{name}-s[0-9]*"))]
        for name in ablations.VARIANTS
    }
    found = {name: seeds for name, seeds in found.items() if seeds}
    if not found:
        raise InputError(f"{folder}: no runs here; scripts/ablations.py makes them")
    for name, seeds in found.items():
        if len({json.dumps(arguments(seed.run), sort_keys=True) for seed in seeds}) > 1:
            raise InputError(f"{folder}/{name}-s…: runs of one variant with different options")
    return found


def arguments(run: dict) -> dict:
    """Those that shape a run, without its seed and places."""
    apart = {"seed", "data_path", "vocab_path", "model_name", "logger_name", "resume"}
    given = DEFAULTS | run["arguments"]  # an older run has not all of today's options
    return {name: value for name, value in given.items() if name not in apart}


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; of a single run the value alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def variants_table(folder: Path) -> str:
    """One row a variant: recalls on test, parameters, minutes."""
    rows = [
        "| model | seeds | i2t R@1 | t2i R@1 | dev rsum | test rsum | 95 % interval | parameters "
        "| training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in variants(folder).items():
        ends = zip(*(seed.test["bootstrap"]["rsum"] for seed in seeds), strict=True)
        low, high = (statistics.mean(end) for end in ends)
        minutes = statistics.mean(60 * training_hours(seed.lines) for seed in seeds)
        cells = [
            ablations.VARIANTS[name].title, str(len(seeds)),
            *(spread([seed.test[way]["r1"] for seed in seeds]) for way in ("i2t", "t2i")),
            spread([seed.dev for seed in seeds]),
            f"**{spread([seed.test['rsum'] for seed in seeds])}**", f"{low:.1f} – {high:.1f}",
            f"{seeds[0].run['parameters'] / 1e6:.2f} M", f"{minutes:.1f} min",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    if (folder / "cca.json").is_file():
        rows.append(floor_row(folder / "cca.json"))
    return "\n".join(rows)


def floor_row(path: Path) -> str:
    """What cca.py found."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        low, high = found["bootstrap"]["rsum"]
        return (
            f"| linear CCA, mean region and words | – | {found['i2t']['r1']:.1f} "
            f"| {found['t2i']['r1']:.1f} | {found['dev_rsum']:.1f} | **{found['rsum']:.1f}** "
            f"| {low:.1f} – {high:.1f} | {found['parameters'] / 1e6:.2f} M | closed form |"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the figures of scripts/cca.py ({error!r})") from error


def scenes_table(folder: Path) -> str:
    """One row a variant: accuracy on relations, attributes and counts."""
    kinds = diagnose.KINDS
    rows = [
        f"| model | seeds | {' | '.join(kinds)} | test rsum | parameters | training |",
        "|---|---|" + "---|" * (len(kinds) + 3),
    ]
    for name, seeds in variants(folder).items():
        made = [seed.diagnosis() for seed in seeds]
        minutes = statistics.mean(60 * training_hours(seed.lines) for seed in seeds)
        cells = [
            ablations.VARIANTS[name].title, str(len(seeds)),
            *(spread([one[kind]["accuracy"] for one in made]) for kind in kinds),
            spread([seed.test["rsum"] for seed in seeds]),
            f"{seeds[0].run['parameters'] / 1e6:.2f} M", f"{minutes:.1f} min",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plain(title: str) -> str:
    return title.replace("`", "")


def scenes_figure(folder: Path) -> plt.Figure:
    """What each variant gets right of each kind: a bar to the mean, a dot a seed."""
    found = list(variants(folder).items())[::-1]
    fig, axes = plt.subplots(
        1, len(diagnose.KINDS), figsize=(12, 0.8 + 0.36 * len(found)), sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, kind in zip(axes, diagnose.KINDS, strict=True):
        for y, (_, seeds) in enumerate(found):
            values = [seed.diagnosis()[kind]["accuracy"] for seed in seeds]
            ax.barh(y, statistics.mean(values) - 50, left=50, height=0.5, color="#a9c6e3")
            ax.plot(values, [y] * len(values), "o", color="#1f4e79", ms=4)
        ax.set_title(kind, fontsize=11)
        ax.set_xlim(45, 101)
        ax.set_xlabel("accuracy (%)", fontsize=9)
        ax.axvline(50, color="grey", lw=1, ls=":")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(found)))
    axes[0].set_yticklabels([plain(ablations.VARIANTS[name].title) for name, _ in found])
    return fig


def variants_figure(folder: Path) -> plt.Figure:
    """Dev rsum against minutes of training: the mean of a variant's seeds, and their range."""
    fig, ax = plt.subplots(figsize=(10, 4.2), layout="constrained")
    found = variants(folder).items()
    found = [(name, seeds) for name, seeds in found if name not in ablations.ONE_PART]
    for color, (name, seeds) in zip(plt.cm.tab10.colors * 2, found, strict=False):
        curves = [[line["rsum"] for line in seed.lines if line["type"] == "dev"] for seed in seeds]
        minutes = statistics.mean(60 * training_hours(seed.lines) for seed in seeds)
        n = min(map(len, curves))
        x = [minutes * (k + 1) / n for k in range(n)]
        y = [statistics.mean(values) for values in zip(*(c[:n] for c in curves), strict=True)]
        ends = list(zip(*(c[:n] for c in curves), strict=True))
        ax.plot(x, y, "o-", ms=3, color=color, label=plain(ablations.VARIANTS[name].title))
        ax.fill_between(x, [min(e) for e in ends], [max(e) for e in ends], color=color, alpha=0.15)
    ax.set_xlabel("minutes of training")
    ax.set_ylabel("dev rsum")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return fig


# -- the paper's experiments ----------------------------------------------------------------------

EXPERIMENTS = {  # script, train captions, epochs, protocols
    "Flickr30K": ("scripts/train_f30k.sh", "scripts/eval_f30k.sh", 145_000, 50, "F30K 1K"),
    "MS-COCO": ("scripts/train_coco.sh", "scripts/eval_coco.sh", 566_435, 50, "COCO 1K and 5K"),
}


def experiments_table(folder: Path) -> str:
    """The commands, and how long they would take at the training step that was measured."""
    rows = [
        "| data | training | evaluation | protocol | steps | paper | ours |",
        "|---|---|---|---|---|---|---|",
    ]
    times = []
    for name, (train, test, captions, epochs, protocol) in EXPERIMENTS.items():
        rows.append(
            f"| {name} | `bash {train}` | `bash {test}` | {protocol} "
            f"| {-(-captions // 128) * epochs:,} | see the paper | not measured yet |"
        )
    for file in sorted(folder.glob("*.json")):
        rate, _, batch, machine = plan.measured(file)
        work = plan.Work.of(batch)
        step = (work.divided + work.products) / rate
        hours = (
            f"{name} {-(-captions // batch) * epochs * step / 3600:,.0f} h"
            for name, (_, _, captions, epochs, _) in EXPERIMENTS.items()
        )
        times.append(f"{machine}, {step:.1f} s a step at batch {batch}: {', '.join(hours)}")
    return "\n".join([*rows, "", f"Expected from the measured step. {'; '.join(times)}."])


def figures(folder: Path, markdown: Callable[[dict], str]) -> str:
    """The tables of all files that a benchmark's --json wrote into a folder."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"{folder}: no figures here (files of a benchmark's --json)")
    try:
        return "\n\n".join(markdown(json.loads(file.read_text("utf-8"))) for file in files)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: not a benchmark's figures ({error!r})") from error


def fill(text: str, name: str, content: str, where: Path) -> str:
    """`text` with `content` between the marks of `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"{where}: the marks {begin} and {end} should stand there once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of the runs")
    parser.add_argument("--readme", default=ROOT / "README.md", type=Path)
    parser.add_argument("--write", action="store_true", help="put the tables into the README")
    parser.add_argument("--check", action="store_true", help="compare with the README")
    opt = parser.parse_args()
    tables = {
        "results": table(opt.results),
        "flickr8k": variants_table(opt.results / "flickr8k"),
        "scenes": scenes_table(opt.results / "scenes"),
        "experiments": experiments_table(opt.results / "speed"),
        "speed": figures(opt.results / "speed", benchmark.markdown),
        "distributed": figures(opt.results / "distributed", benchmark_distributed.markdown),
        "search": figures(opt.results / "search", benchmark_search.markdown),
    }
    text = made = opt.readme.read_text(encoding="utf-8")
    for name, content in tables.items():
        made = fill(made, name, content, opt.readme)
    if opt.write:
        opt.readme.write_text(made, encoding="utf-8")
        fig = opt.readme.parent / "fig"
        fig.mkdir(exist_ok=True)
        scenes_figure(opt.results / "scenes").savefig(fig / "scenes.png", dpi=110)
        variants_figure(opt.results / "flickr8k").savefig(fig / "flickr8k.png", dpi=110)
    elif opt.check:
        if text != made:
            print(f"{opt.readme}: its tables are not those of {opt.results}", file=sys.stderr)
            sys.exit(1)
        print("the README's tables are those of the logs")
    else:
        print(*tables.values(), sep="\n\n")


if __name__ == "__main__":
    main()
