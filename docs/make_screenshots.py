"""The explorer's pictures in the docs, taken in Chromium from a running server.

    wherefrom serve my.wherefrom
    python docs/make_screenshots.py --url http://127.0.0.1:8787 --prompt "..." --completion " ..."

Writes explorer.png (desktop) and explorer-phone.png (a phone's width, dark) next to this file.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main():
    """Ask, wait for the heat maps, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8787")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--completion", required=True)
    parser.add_argument("--group-by", default="source")
    args = parser.parse_args()
    here = Path(__file__).parent
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="light")
        page.goto(args.url)
        page.wait_for_selector(f"#group option[value={args.group_by}]", state="attached")
        page.fill("#prompt", args.prompt)
        page.fill("#completion", args.completion)
        page.select_option("#group", args.group_by)
        page.check("#baselines")
        page.click("#go")
        page.wait_for_selector("#proponents .heat-for")
        page.wait_for_selector("#histogram svg")
        page.wait_for_selector("#state:empty", state="attached")  # all is explained
        page.evaluate("document.querySelector('#results').scrollIntoView()")
        page.screenshot(path=here / "explorer.png")
        page.set_viewport_size({"width": 390, "height": 844})
        page.click("#theme")
        page.evaluate("document.querySelector('#proponents').scrollIntoView()")
        page.evaluate("scrollBy(0, -60)")
        page.screenshot(path=here / "explorer-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
