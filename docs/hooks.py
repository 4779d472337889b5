"""Hooks of mkdocs.yml: pages from other files, and formulas as MathML.

The files of the repository's root and the notebooks become pages. Links between the root and
`docs/` are rewritten, so that one link works on GitHub and in the site.
"""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file of `ROOT_PAGES` and for each notebook."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        page = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(notebook, path.name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points the links to files of the root at their pages."""
    depth = page.file.src_uri.count("/")
    for name in ROOT_PAGES:
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{name}", f"]({'../' * depth}{name}")
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Returns the page with its formulas as MathML, which browsers show without a script."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        formula = convert(html.unescape(match[2]).strip(), display=display)
        return f'<div style="overflow-x: auto">{formula}</div>' if display == "block" else formula

    return _FORMULA.sub(mathml, content)


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """Returns an executed notebook as Markdown: its cells, printed outputs and images."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += filter(None, map(_output, cell["outputs"]))
    title, *rest = parts
    note = f"This page is an executed notebook: [{name}]({name}), to download."
    return "\n\n".join([title, note, *rest]) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        image = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        return f'<img alt="Output of the cell above" src="data:image/png;base64,{image}">'
    text = _ESCAPE.sub("", "".join(data["text/plain"])).rstrip()
    return f"```text\n{text}\n```" if text else ""
