"""The README's tables of results, speed, search and several processes, made from logs.

    python scripts/results.py            # print the tables
    python scripts/results.py --write    # put them into the README
    python scripts/results.py --check    # exit 1 if the README says something else

A run is a folder of `results/` that holds `metrics.jsonl` (as train.py wrote it) and `test.json`
(as `evaluation.py --save_metrics` wrote it); its name is the row's. A file of `results/speed/` is
what `benchmark.py --json` wrote on one machine; of `results/search/` and `results/distributed/`,
`benchmark_search.py --json` and `benchmark_distributed.py --json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import benchmark
import benchmark_distributed
import benchmark_search

from errors import InputError, one_line

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
        "speed": figures(opt.results / "speed", benchmark.markdown),
        "distributed": figures(opt.results / "distributed", benchmark_distributed.markdown),
        "search": figures(opt.results / "search", benchmark_search.markdown),
    }
    text = made = opt.readme.read_text(encoding="utf-8")
    for name, content in tables.items():
        made = fill(made, name, content, opt.readme)
    if opt.write:
        opt.readme.write_text(made, encoding="utf-8")
    elif opt.check:
        if text != made:
            print(f"{opt.readme}: its tables are not those of {opt.results}", file=sys.stderr)
            sys.exit(1)
        print("the README's tables are those of the logs")
    else:
        print(*tables.values(), sep="\n\n")


if __name__ == "__main__":
    main()
