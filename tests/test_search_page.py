"""The search page, as somebody in front of a browser sees it (headless Chromium)."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT
from test_search import SENTENCE, demo_index, scores

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")
OFFLINE = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a served index, in a browser."""
    folder = demo_index(tmp_path_factory.mktemp("page"))
    url = f"http://127.0.0.1:{(port := free_port())}"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "scripts/search.py"), "serve", "--index",
         "index", "--port", str(port)], cwd=folder, stderr=subprocess.PIPE,
    )  # fmt: skip
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=5)
            break
        except OSError:
            assert server.poll() is None, server.stderr.read().decode()
            time.sleep(0.5)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        page = browser.new_page()
        page.goto(url)
        page.folder = folder
        yield page
        browser.close()
    server.terminate()
    server.wait(10)


@needs_chromium
@pytest.mark.slow
def test_type_a_sentence_see_the_right_picture_first_click_it_see_attention(page):
    page.locator("#sentence textarea").fill(SENTENCE)
    page.locator("#go").click()
    first = page.locator("#answers .gallery-item, #answers .thumbnail-item").first
    first.wait_for(timeout=30_000)
    best = int(scores(page.folder, SENTENCE).argmax())
    names = (page.folder / "data/mine/test_ids.txt").read_text().split()
    assert names[best] in first.inner_text()
    first.click()
    shown = page.locator("#attention img")
    shown.wait_for(timeout=30_000)
    assert shown.evaluate("image => image.naturalWidth") > 300


@needs_chromium
@pytest.mark.slow
def test_an_empty_sentence_is_answered_with_a_word(page):
    page.locator("#sentence textarea").fill("  ")
    page.locator("#go").click()
    toast = page.get_by_text("empty query")
    toast.first.wait_for(timeout=30_000)
