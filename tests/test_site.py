"""The built pages in a browser: nothing is cut off, and no page scrolls sideways."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.site,
    pytest.mark.skipif(not BROWSER, reason="needs Chromium"),
]
# Runs in the page. What may be wider than the page has a bar of its own.
MEASURE = """
<script>window.addEventListener("load", () => {
  const scrolls = (node) => {
    for (; node && node !== document.body; node = node.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(node).overflowX)) return true;
    return false;
  };
  const cut = [...document.querySelectorAll(".bd-article :is(table, pre, img, p, li)")]
    .filter((x) => x.getBoundingClientRect().right > innerWidth + 1 && !scrolls(x))
    .map((x) => x.outerHTML.slice(0, 80));
  const wide = [...document.querySelectorAll(".bd-article :is(pre)")]
    .filter((x) => x.scrollWidth > x.clientWidth + 1)
    .map((x) => Math.max(...x.textContent.split("\\n").map((y) => y.length)));
  const boxes = document.querySelectorAll("[aria-label=Search], .search-button-field");
  const searches = [...boxes].filter((x) => x.getClientRects().length).length;
  const page = document.documentElement.scrollWidth - innerWidth;
  const found = {page, cut, wide, searches};
  parent.postMessage(JSON.stringify(found), "*");
})</script>
"""
# Of the width that is asked for: windows are not narrower than 500 pixels.
FRAME = """
<iframe src="{page}" width="{width}" height="1500"></iframe>
<script>window.addEventListener("message", (event) => {{
  document.title = "FOUND" + event.data + "END";
}})</script>
"""


@pytest.fixture(scope="session", name="site")
def _site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", DOCS, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def measured(page, width):
    copy, frame = (page.with_name(f"{name}-{page.name}") for name in ("copy", "frame"))
    # Formulas come from the network, which tests do without.
    text = re.sub(r"<script[^>]*mathjax[^>]*></script>", "", page.read_text())
    copy.write_text(text.replace("</body>", MEASURE + "</body>"))
    frame.write_text(FRAME.format(page=copy.name, width=width))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--window-size=1400,1600", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    copy.unlink()
    frame.unlink()
    (found,) = re.findall(r"<title>FOUND(.*?)END</title>", done.stdout)
    return json.loads(html.unescape(found))


def pages(site):
    names = [
        *site.glob("*.html"),
        *site.glob("api/*.html"),
        *site.glob("_generated/**/*.html"),
    ]
    return sorted(
        x for x in names if x.stem not in ("genindex", "py-modindex", "search")
    )


def test_nothing_is_cut_off(site):
    found = {}
    for page in pages(site):
        for width in (1280, 390):
            seen = measured(page, width)
            name = f"{page.relative_to(site)} at {width}"
            if seen["page"] > 0 or seen["cut"]:
                found[name] = seen
            # Code of 72 columns is seen whole beside the navigation.
            if width == 1280 and seen["wide"] and min(seen["wide"]) <= 72:
                found[f"{name}, code"] = seen["wide"]
    assert not found, found


def test_there_is_one_search_box(site):
    assert measured(site / "traps.html", 1280)["searches"] == 1
