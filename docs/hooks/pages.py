"""Takes pages from outside of docs/ into the site, and turns links between files of the repository into its links."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "parity_tests/README.md", "benchmarks/README.md")
LINK = re.compile(r"(?P<text>\[[^\[\]]*\])\((?P<target>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand next to what they describe."""
    root = Path(config.config_file_path).parent
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the repository become links of the site; those to a file that is not a page become its name."""
    source = page.file.src_uri
    here = source if source in OUTSIDE else f"docs/{source}"

    def in_the_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link["target"]))
        if target not in OUTSIDE and not target.startswith("docs/"):
            return f"{link['text'][1:-1]} (`{target}`)" if target not in link["text"] else f"`{target}`"
        within = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(source) or ".")
        return f"{link['text']}({within}{link['anchor'] or ''})"

    return LINK.sub(in_the_site, markdown)
