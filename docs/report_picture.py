"""Photographs part of an attention report for README.md, in a browser without a window.

python train.py --config=configs/quickstart.py --workdir=runs/lazy
python train.py --config=configs/quickstart.py:softmax --workdir=runs/softmax
python train.py --mode=inspect --workdir=runs/lazy --against=runs/softmax
python docs/report_picture.py runs/lazy/inspection/report.html
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

from PIL import Image

PICTURE = pathlib.Path(__file__).parent / "pictures" / "report.png"
SIZE = (1060, 1180)
# What a reader of README.md wants to see first; the rest is in the report.
STYLE = """<style>
nav, section:not(#summary, #maps, .map section), section > p, #maps figcaption { display: none; }
.layout { display: block; max-width: none; } main { padding: 1.2rem 1.4rem 0; }
#summary tr:is(:nth-child(2), :nth-child(5), :nth-child(n + 7)):not(:nth-child(11)) {
  display: none;
}
#summary tr:nth-child(11) td { border: 0; }
.map:not(:nth-last-child(-n + 4)) { display: none; }
td, th { padding: .1rem .7rem; } section { margin-top: 1.1rem; } .map canvas { max-width: 12rem; }
.key { flex-wrap: nowrap; gap: 3rem; } .key small { font-size: .8125rem; }
</style>"""


def main(report: str) -> None:
    """Opens the report, with the rest of it left out, and writes the picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("This needs Chromium or Chrome.")
    page = pathlib.Path(report).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        shown, taken = pathlib.Path(folder, "page.html"), pathlib.Path(folder, "taken.png")
        shown.write_text(page.replace("</head>", STYLE + "</head>", 1), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=5000"]
        subprocess.run([*command, f"--screenshot={taken}", shown.as_uri()], check=True)
        Image.open(taken).convert("RGB").save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
