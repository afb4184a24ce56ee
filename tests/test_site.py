"""The documentation site: every page and public name is there, its links lead somewhere, and no other host is asked."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import wherefrom

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
ENTRIES = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what a browser loads with it."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        if tag == "link" and values.get("rel") != "canonical":
            self.loaded.add(values["href"])
        if values.get("src"):
            self.loaded.add(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out


def built(site, page):
    """Address of a page of the repository on the site."""
    path = page.relative_to(ROOT)
    return site / ("index.html" if path == Path("README.md") else path.with_suffix(".html"))


def test_the_api_page_has_every_public_name():
    assert {f"wherefrom.{name}" for name in wherefrom.__all__} <= set(ENTRIES)
    assert len(set(ENTRIES)) == len(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_the_api_page_names_can_be_imported_under_that_name(entry):
    module, _, name = entry.rpartition(".")
    assert getattr(importlib.import_module(module), name).__doc__


def test_the_site_describes_every_name_of_the_api_page(site):
    assert set(ENTRIES) <= Page(built(site, ROOT / "docs/api.md")).anchors


def test_the_site_has_every_page_and_leads_to_it(site):
    links = {link.partition("#")[0] for link in Page(site / "index.html").links}
    for page in PAGES:
        path = built(site, page)
        title = re.search(r"^# (.*)$", page.read_text(), re.MULTILINE)[1]
        assert re.search(rf"<h1[^>]*>{re.escape(title)}<", path.read_text()), path
        assert path.name == "index.html" or path.relative_to(site).as_posix() in links, path


def test_links_and_images_of_the_site_lead_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (path.name, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, (path.name, link)


def test_the_site_loads_nothing_from_other_hosts(site):
    for path in site.rglob("*.html"):
        page = Page(path)
        assert not [link for link in page.loaded if urlsplit(link).netloc], path
        assert "mermaid" not in {name for anchor in re.findall(r'<pre class="([^"]*)"', path.read_text()) for name in anchor.split()}
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", path.read_text()), path
