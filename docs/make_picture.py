"""Draw the README's picture: an answer of the demo's index, as the terminal shows it.

wherefrom demo && python docs/make_picture.py wherefrom-demo/index.wherefrom
"""

import io
import sys
from pathlib import Path

from rich.console import Console
from wherefrom import Client
from wherefrom.demo.run import QUERIES
from wherefrom.terminal import renderables

# Rich's own frame fetches a font from a CDN; this one uses what the reader has.
FRAME = """<svg viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; }}
.{unique_id}-matrix {{ font-size: {char_height}px; line-height: {line_height}px; }}
{styles}</style>
<rect width="100%" height="100%" rx="8" fill="#1d1f28"/>
<g transform="translate(10, 0)" class="{unique_id}-matrix">{backgrounds}{matrix}</g></svg>
"""


def main():
    """Ask the demo's first query and save the picture next to this file."""
    prompt, completion = QUERIES[0]
    client = Client(sys.argv[1])
    for _ in range(2):  # the first query also reads the rows from disk
        answer = client.query(prompt=prompt, completion=completion, k=3)
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    for part in renderables(answer):
        console.print(part)
    svg = console.export_svg(title="", code_format=FRAME)
    Path(__file__).with_name("answer.svg").write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


if __name__ == "__main__":
    main()
