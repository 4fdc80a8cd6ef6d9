"""MkDocs hooks: pages from files outside ``docs/`` and from notebooks, and links between them."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# file of the checkout -> page of the site
OUTSIDE_PAGES = {
    "infra/launch/README.md": "launch.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")
TERMINAL_CODE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose files lie outside ``docs/``, and replace each notebook by a page."""
    for source, page in OUTSIDE_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        stem = notebook.src_uri.removesuffix(".ipynb")
        markdown, images = notebook_page(json.loads(notebook.content_string), PurePosixPath(stem).name)
        files.append(File.generated(config, f"{stem}.md", content=markdown))
        folder = PurePosixPath(stem).parent
        for name, content in images.items():
            files.append(File.generated(config, str(folder / name), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links, which are relative to the file in the checkout, at the pages of the site."""
    sources = {page: source for source, page in OUTSIDE_PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        target = normpath(str(PurePosixPath(source).parent / match[1]))
        if target in OUTSIDE_PAGES:
            target = OUTSIDE_PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
            target = re.sub(r"\.ipynb$", ".md", target)
        else:
            return match[0]  # not a page of the site; the strict build reports it
        return f"]({relpath(target, str(PurePosixPath(page.file.src_uri).parent))}{match[2] or ''})"

    return LINK.sub(rewrite, markdown)


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, with its outputs, and its images as name -> bytes. Names begin with ``stem``."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code":
            parts.append(_fenced(text, "python"))
            parts += [_output(output, stem, images) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n", images


def _output(output: dict[str, Any], stem: str, images: dict[str, bytes]) -> str:
    """Return one output of a cell as Markdown; an image is added to ``images``."""
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]), "text")
    if output["output_type"] == "error":
        return _fenced("\n".join(output["traceback"]), "text")
    data = output["data"]
    if "image/png" in data:
        name = f"{stem}-{len(images) + 1}.png"
        images[name] = base64.b64decode("".join(data["image/png"]))
        return f"![output]({name})"
    if "text/html" in data:
        return "".join(data["text/html"])
    return _fenced("".join(data.get("text/plain", "")), "text")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{TERMINAL_CODE.sub('', text).rstrip()}\n```"
