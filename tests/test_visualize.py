"""The retrieval figure: right answers are framed, with and without pictures."""

import numpy as np
import pytest
import visualize
from conftest import write_split
from PIL import Image
from test_commands import refused, run

CAPTIONS = [f"caption {i}" for i in range(20)]
SIMS = np.random.default_rng(0).random((4, 20)).astype(np.float32)


def framed(fig):
    """(row, column) places of framed pictures."""
    return [
        ax for ax in fig.axes
        if ax.spines["top"].get_edgecolor()[:3] == pytest.approx((0.102, 0.541, 0.373), abs=0.01)
        and ax.spines["top"].get_linewidth() == 4
    ]  # fmt: skip


def test_each_query_frames_its_own_picture():
    """All four pictures are shown to each caption, so that the right one is among them."""
    fig = visualize.retrieval_figure(SIMS, CAPTIONS, list("abcd"), None, n_queries=3, top=4)
    assert len(framed(fig)) == 3
    texts = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert any(text.startswith("✓ ") for text in texts)


def test_queries_of_all_ranks_are_shown():
    ranks = np.array([5, 0, 3, 9, 1])
    assert ranks[visualize.spread(ranks, 3)].tolist() == [0, 3, 9]


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_the_command_writes_a_figure(tmp_path, suffix):
    write_split(tmp_path / "data" / "tiny", "test", 4)
    np.save(tmp_path / "sims.npy", SIMS)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "test0", "PNG")
    result = run(
        tmp_path, "scripts/visualize.py", "retrieval", "--sims", "sims.npy", "--data_name", "tiny",
        "--pictures", "pictures", "--out", f"out.{suffix}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"out.{suffix}").stat().st_size > 5000


def test_scores_that_do_not_fit_are_refused(tmp_path):
    write_split(tmp_path / "data" / "tiny", "test", 4)
    np.save(tmp_path / "sims.npy", SIMS[:, :10])
    arguments = ("scripts/visualize.py", "retrieval", "--data_name", "tiny", "--sims")
    refused(run(tmp_path, *arguments, "sims.npy"), "sims.npy", "(4, 10)")
    refused(run(tmp_path, *arguments, "none.npy"), "none.npy")
