"""Headless Chromium, driven by Playwright, without a network; and a report to look at."""

import os
import shutil

import pytest
from pages import DESKTOP, Opened
from stored_runs import make_run

from gtr_turbo.report import write_report


def without(what):
    """A browser test cannot run: that is a failure where CI is set, so that CI cannot pass without them."""
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, so the report must be tested in a browser: {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        without("no Chromium found; on Debian: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("Playwright is not installed: pip install playwright")
    with sync_playwright() as playwright:
        # --no-sandbox: Chromium refuses to run as root otherwise; the page is our own
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a file; afterwards there must have been no complaint and no request."""
    contexts, pages = [], []

    def make(file, viewport=DESKTOP, scheme="light"):
        context = chromium.new_context(
            viewport=viewport, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        pages.append(Opened(context.new_page(), file))
        return pages[-1]

    yield make
    for page in pages:
        page.check()
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two seeds of a toy: 9 episodes of 2 environments each; the second run has two invalid replies."""
    folder = tmp_path_factory.mktemp("report")

    def invalid(line):
        if line["episode"] == 4 and line["step"] == 0:
            return line | {
                "valid": False,
                "legal": False,
                "reply": "mumble",
                "action": "",
                "kl_tokens": [],
            }
        return line

    runs = [make_run(folder / "toy-seed0"), make_run(folder / "toy-seed1", seed=1, change=invalid)]
    write_report(runs, folder / "report.html")
    return folder / "report.html"
