"""The README's results table, made from run logs.

    python scripts/results.py            # print the table
    python scripts/results.py --write    # put it into the README
    python scripts/results.py --check    # exit 1 if the README says something else

A run is a folder of `results/` that holds `metrics.jsonl` (as train.py wrote it) and `test.json`
(as `evaluation.py --save_metrics` wrote it); its name is the row's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from errors import InputError, one_line

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
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
    """Hours spent in training steps, validation left out."""
    seconds, before = 0.0, 0
    for line in lines:
        if line["type"] == "train":
            seconds += (line["step"] - before) * line["batch_time"]
            before = line["step"]
    return seconds / 3600


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


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of the runs")
    parser.add_argument("--readme", default=ROOT / "README.md", type=Path)
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument("--check", action="store_true", help="compare with the README")
    opt = parser.parse_args()
    made = f"{BEGIN}\n{table(opt.results)}\n{END}"
    text = opt.readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{opt.readme}: the marks {BEGIN} and {END} should stand there once")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    if opt.write:
        opt.readme.write_text(before + made + after, encoding="utf-8")
    elif opt.check:
        if text != before + made + after:
            print(f"{opt.readme}: its results are not those of {opt.results}", file=sys.stderr)
            sys.exit(1)
        print("the README's results are those of the logs")
    else:
        print(made)


if __name__ == "__main__":
    main()
