"""Pictures of a report as a phone and a desktop show it, light and dark, and whether any of it leaves the window.

pip install playwright    # drives the Chromium that is installed: apt-get install chromium
python benchmarks/screenshots.py docs/demo/report.html docs/demo
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

WINDOWS = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")


def shown(browser: Browser, report: Path, window: str, scheme: str, out: Path) -> bool:
    """Takes one picture of the top of the page; says whether the page is as wide as the window."""
    width, height = WINDOWS[window]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=window == "phone"
    )
    page = context.new_page()
    page.goto(report.as_uri())
    fits = bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))
    page.screenshot(path=str(out / f"{report.stem}-{window}-{scheme}.png"))
    context.close()
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    asked = parser.parse_args()
    wide = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=asked.chromium, args=["--no-sandbox"])
        for window in WINDOWS:
            for scheme in SCHEMES:
                if not shown(browser, asked.report.resolve(), window, scheme, asked.out):
                    wide.append(f"{window}, {scheme}")
        browser.close()
    sys.exit(f"wider than the window: {'; '.join(wide)}" if wide else 0)


if __name__ == "__main__":
    main()
