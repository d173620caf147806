"""Photograph parts of the reports in docs/results: pictures of README and docs.

    python docs/make_images.py

Wants Playwright (of the extra `dev`) and Chromium. To be made again when those reports are.
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
PICTURES = {
    # name: report, what of it, width of the page
    "replay": ("points24", "#replay-body", 1240),
    "curves": ("points24", "#curves-body", 900),
    "stress": ("stress", "#comparison-body .panel >> nth=0", 900),
}


def main() -> None:
    """Write each picture to docs/images."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    with sync_playwright() as playwright:
        # --no-sandbox: Chromium refuses to run as root otherwise; the page is our own
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (report, part, width) in PICTURES.items():
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
            page.goto((HERE / "results" / f"{report}.html").as_uri())
            page.select_option("#show-metrics", "rollout/success")
            page.select_option("#filter-order", "kl")
            if name == "replay":
                page.get_by_text("env 3, episode 129").first.click()
                page.locator("#strip button").nth(2).click()  # its third turn
            page.locator(part).screenshot(path=HERE / "images" / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
