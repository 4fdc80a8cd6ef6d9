"""MkDocs hooks: pages from files outside ``docs/``, and links to those files."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# file of the checkout -> page of the site
OUTSIDE_PAGES = {
    "infra/launch/README.md": "cluster.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose files lie outside ``docs/``."""
    for source, page in OUTSIDE_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links, which are relative to the file in the checkout, at the pages of the site."""
    pages = {page: source for source, page in OUTSIDE_PAGES.items()}
    source = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        target = normpath(str(PurePosixPath(source).parent / match[1]))
        if target in OUTSIDE_PAGES:
            target = OUTSIDE_PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return match[0]  # not a page; the strict build reports it
        return f"]({relpath(target, str(PurePosixPath(page.file.src_uri).parent))}{match[2] or ''})"

    return LINK.sub(rewrite, markdown)
