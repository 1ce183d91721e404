"""A page in a real browser without a window: what it drew, and what went wrong."""

import json
import os
import re
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Runs before anything of the page: notes errors, and whatever the page asks of others.
_BEFORE = """<script>
window.seen = {errors: [], requests: []};
addEventListener("error", (e) => seen.errors.push(String(e.message || e.target.outerHTML)), true);
addEventListener("unhandledrejection", (e) => seen.errors.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => seen.requests.push(e.blockedURI));
for (const kind of ["error", "warn"])
  console[kind] = (...words) => seen.errors.push(words.join(" "));
</script>"""
# Runs last: uses every control, then writes down what there is.
_AFTER = """<script>
const uses = () => {
  // Redrawing replaces the buttons, so each is looked up anew.
  for (let i = 0; i < document.querySelectorAll("button").length; i++)
    document.querySelectorAll("button")[i].click();
  for (const node of document.querySelectorAll("svg, canvas, rect, circle")) {
    const box = node.getBoundingClientRect();
    const at = {clientX: box.left + box.width / 3, clientY: box.top + box.height / 2};
    node.dispatchEvent(new PointerEvent("pointermove", {...at, bubbles: true}));
    node.dispatchEvent(new PointerEvent("pointerleave"));
  }
};
addEventListener("load", () => {
  seen.theme = [document.documentElement.dataset.theme];
  document.getElementById("theme").click();
  seen.theme.push(document.documentElement.dataset.theme);
  uses();
  setTimeout(() => {
    seen.requests.push(...performance.getEntriesByType("resource").map((e) => e.name));
    seen.figures = {};
    for (const box of document.querySelectorAll("[data-figure]")) {
      const drawn = [...box.querySelectorAll("svg, canvas")].map((n) => n.getBoundingClientRect());
      seen.figures[box.dataset.figure] = {
        marks: Number(box.dataset.marks),
        pictures: drawn.length,
        smallest: Math.min(...drawn.map((d) => Math.min(d.width, d.height))),
        bad: /NaN|undefined|Infinity/.test(box.innerHTML + box.textContent),
        overflow: drawn.some((d) => d.right > box.getBoundingClientRect().right + 1),
      };
    }
    const out = document.createElement("pre");
    out.id = "seen";
    out.textContent = encodeURIComponent(JSON.stringify(seen));
    document.body.appendChild(out);
  }, 100);
});
</script>"""


def find():
    """Returns a browser's path; skips the test where there is none."""
    named = os.environ.get("LAZYATTN_BROWSER")
    path = shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("no Chromium or Chrome found; LAZYATTN_BROWSER may name one")
    return path


def open_page(html, folder, width=1280):
    """Opens a page and returns what was seen, as a dict.

    Args:
      html: the page.
      folder: for files.
      width: of the window.
    """
    html = html.replace('<meta charset="utf-8">', '<meta charset="utf-8">' + _BEFORE, 1)
    path = folder / "opened.html"
    path.write_text(html.replace("</body>", _AFTER + "</body>", 1), encoding="utf-8")
    command = [
        find(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        # Nobody can be reached, the browser's maker included.
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
        "--virtual-time-budget=10000",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="seen">([^<]*)</pre>', done.stdout)
    assert found, f"the page did not finish: {done.stderr[-2000:]}"
    from urllib.parse import unquote

    return json.loads(unquote(found[1]))
