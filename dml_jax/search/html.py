"""Search results as HTML: a self-contained contact sheet, and the pages of the server."""

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from string import Template

from dml_jax import data
from dml_jax.search.gallery import Gallery, Neighbour

THUMBNAIL = 240
"""Longer side of a thumbnail, pixels."""

MAX_UPLOAD_BYTES = 20 << 20
"""Largest image that may be uploaded."""


def sheet(gallery: Gallery, found: Sequence[tuple[str, bytes, Sequence[Neighbour]]]) -> str:
    """Returns a contact sheet with all images embedded, which needs no other file.

    Args:
        gallery: the gallery that was searched.
        found: the name, the encoded image and the neighbours of each query.

    Returns:
        The page.
    """

    def embed_thumbnail(neighbour: Neighbour) -> str | None:
        encoded = thumbnail(gallery, neighbour.row)
        return None if encoded is None else _data_url(encoded)

    parts = []
    for name, image, neighbours in found:
        preview = _data_url(data.preview(image, name, side=THUMBNAIL))
        parts.append(
            f'<section><header class="query"><img src="{preview}" alt="">'
            f"<div><h2>{escape(name)}</h2>{_classes(neighbours)}</div></header>"
            f"{_neighbours(neighbours, embed_thumbnail)}</section>"
        )
    return _page("Contact sheet", gallery.facts, "\n".join(parts))


def thumbnail(gallery: Gallery, row: int, *, side: int = THUMBNAIL) -> bytes | None:
    """Returns a JPEG of a gallery image; None if its file is missing or cannot be read."""
    file = gallery.file(row)
    try:
        return None if file is None else data.preview(file.read_bytes(), file.name, side=side)
    except (OSError, ValueError):
        return None


def results(neighbours: Sequence[Neighbour]) -> str:
    """Returns the server's answer to a query, with the URLs of the images."""
    items = _neighbours(
        neighbours,
        lambda neighbour: f"/thumbnail/{neighbour.row}",
        lambda neighbour: f"/image/{neighbour.row}",
    )
    return _classes(neighbours) + items


def search_page(gallery: Gallery) -> str:
    """Returns the page to which images are dropped."""
    return _page("Search by image", gallery.facts, _UPLOAD) + f"<script>{SCRIPT}</script>\n"


def _page(title: str, facts: str, body: str) -> str:
    return _PAGE.substitute(title=title, facts=escape(facts), style=_STYLE, body=body)


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _classes(neighbours: Sequence[Neighbour]) -> str:
    """Returns the number of neighbours of each class, the most frequent first."""
    counts = Counter(neighbour.class_name for neighbour in neighbours).most_common(5)
    text = ", ".join(f"{escape(name)} <b>×{count}</b>" for name, count in counts)
    return f'<p class="classes">{text}</p>'


def _neighbours(
    neighbours: Sequence[Neighbour],
    thumbnail_url: Callable[[Neighbour], str | None],
    link_url: Callable[[Neighbour], str] | None = None,
) -> str:
    """Returns a list of neighbours.

    Args:
        neighbours: the neighbours.
        thumbnail_url: returns the URL of a neighbour's thumbnail; None if it has none.
        link_url: returns the URL that a thumbnail links to.
    """
    items = []
    for rank, neighbour in enumerate(neighbours, 1):
        url, name = thumbnail_url(neighbour), escape(neighbour.name)
        image = (
            f'<img src="{url}" alt="{name}" loading="lazy">'
            if url
            else '<span class="none">no picture</span>'
        )
        if link_url is not None:
            image = f'<a href="{link_url(neighbour)}" target="_blank" rel="noopener">{image}</a>'
        percent = max(0.0, min(100.0, 100 * neighbour.similarity))
        items.append(
            f'<li><div class="picture">{image}</div>'
            f'<p><span class="rank">{rank}</span> <b>{escape(neighbour.class_name)}</b>'
            f'<span class="similarity">{neighbour.similarity:.3f}</span></p>'
            f'<div class="bar"><i style="width:{percent:.1f}%"></i></div>'
            f'<p class="name" title="{name}">{name}</p></li>'
        )
    return f"<ol>{''.join(items)}</ol>"


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>$style</style>
<header class="top"><h1>$title</h1><p>$facts</p></header>
<main>$body</main>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f6f4; --card: #fff; --ink: #1c1d1f;
  --faint: #63666b; --line: #dcdcd8; --mark: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --card: #212326; --ink: #ececea;
  --faint: #a2a5aa; --line: #37393d; --mark: #7db4ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
.top, main { max-width: 1200px; margin: 0 auto; padding: 0 16px; }
.top { padding-top: 20px; }
h1 { font-size: 1.35rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0; }
.top p, .classes, .name, .hint { color: var(--faint); }
section { margin: 20px 0 36px; }
.query { display: flex; gap: 16px; align-items: center; margin-bottom: 14px; }
.query img { width: 120px; height: 120px; object-fit: contain; background: var(--card);
  border: 2px solid var(--mark); border-radius: 8px; }
ol { list-style: none; margin: 14px 0; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(165px, 44%), 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px;
  min-width: 0; }
.picture, .picture a { display: flex; align-items: center; justify-content: center;
  width: 100%; aspect-ratio: 1; }
.picture { margin-bottom: 6px; }
.picture img { width: 100%; height: 100%; object-fit: contain; border-radius: 4px; }
.none { color: var(--faint); }
li p:first-of-type { display: flex; gap: 6px; align-items: baseline; }
li b { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.rank { color: var(--faint); }
.similarity { font-variant-numeric: tabular-nums; }
.bar { height: 3px; margin: 4px 0; background: var(--line); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--mark); border-radius: 2px; }
.name { font-size: .8rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.drop { display: flex; gap: 16px; align-items: center; margin: 18px 0; padding: 18px;
  min-height: 130px; border: 2px dashed var(--line); border-radius: 10px; background: var(--card);
  cursor: pointer; }
.drop:hover, .drop.over, .drop:focus-within { border-color: var(--mark); }
.drop img { width: 96px; height: 96px; object-fit: contain; border-radius: 6px; }
.drop img[hidden] { display: none; }
.drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#status::first-letter { text-transform: uppercase; }
#status:empty { display: none; }
#status.error { color: #b3261e; font-weight: 600; }
@media (prefers-color-scheme: dark) { #status.error { color: #ff9d94; } }
"""

_UPLOAD = """<label class="drop"><img hidden alt="The query image">
<input type="file" accept="image/bmp,image/jpeg,image/png,image/webp,.pgm,.ppm">
<span><b>Drop an image here</b>, paste one, or choose a file.
<span class="hint">It stays on the machine that serves this page.</span></span></label>
<p id="status" role="status"></p><div id="results"></div>"""

_SCRIPT = """
const drop = document.querySelector(".drop"), shown = drop.querySelector("img");
const status = document.querySelector("#status"), results = document.querySelector("#results");
let latest = 0;

function say(text, wrong) {
  status.textContent = text;
  status.className = wrong ? "error" : "";
}

async function search(file) {
  if (!file) return;
  const turn = ++latest;
  results.replaceChildren();
  URL.revokeObjectURL(shown.src);
  shown.hidden = true;
  if (!file.type.startsWith("image/")) return say(file.name + " is not an image.", true);
  if (file.size > MAX_UPLOAD_BYTES) return say("This image is larger than MAX_MEGABYTES MB.", true);
  shown.src = URL.createObjectURL(file);
  shown.hidden = false;
  say("Searching\u2026", false);
  try {
    const answer = await fetch("/search", {
      method: "POST", headers: {"Content-Type": file.type}, body: file });
    const text = await answer.text();
    if (turn !== latest) return;
    if (!answer.ok) return say(text, true);
    say("", false);
    results.innerHTML = text;
  } catch (error) {
    if (turn === latest) say("The server does not answer: is it still running?", true);
  }
}

shown.addEventListener("error", () => { shown.hidden = true; });
drop.querySelector("input").addEventListener("change", event => {
  search(event.target.files[0]);
  event.target.value = "";
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
  });
}
document.addEventListener("drop", event => search(event.dataTransfer.files[0]));
document.addEventListener("paste", event => search(event.clipboardData.files[0]));
"""
SCRIPT = _SCRIPT.replace("MAX_UPLOAD_BYTES", str(MAX_UPLOAD_BYTES)).replace(
    "MAX_MEGABYTES", str(MAX_UPLOAD_BYTES >> 20)
)

SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
"""SHA-256 digest by which the content security policy allows this script and no other."""
