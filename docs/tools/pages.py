"""The site's pages from outside docs/: README, release files, examples, benchmark reports.

They keep the links that they have in the repository; the site has everything under one root, where
docs/ is left out of a path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
TOP = {"README.md": "index.md"}
TOP.update({name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")})
TOP.update({name: name for name in ("CODE_OF_CONDUCT.md", "CITATION.cff", "LICENSE")})
FOLDERS = {"examples": "py md yaml ipynb", "benchmarks/results": "md png"}
CODE = {".py": "python", ".yaml": "yaml", ".ipynb": "", ".cff": "yaml", "": ""}
_ROLE = re.compile(r":(?:class|func|meth|mod):<code>~?([\w.]+)</code>")
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[\w-]+)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Says below each page which version it is of."""
    source = (ROOT / "kd_balance/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    assert version is not None
    config.copyright = f"Version {version[1]}, Apache-2.0"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them."""
    paths = [ROOT / name for name in TOP]
    for folder, endings in FOLDERS.items():
        for ending in endings.split():
            paths += sorted((ROOT / folder).rglob(f"*.{ending}"))
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        place = _place(name)
        if path.suffix == ".ipynb" and (page := _notebook(path)) is not None:
            files.append(File.generated(config, place, content=page))
        elif path.suffix in CODE:
            text = path.read_text(encoding="utf-8")
            page = f"# {name}\n\n````{CODE[path.suffix]}\n{text}\n````\n"
            files.append(File.generated(config, place, content=page))
        else:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Leads links to where the repository's files are on the site."""
    place = page.file.src_uri
    here = {site: name for name, site in TOP.items()}.get(place)
    if here is None:
        here = place if _is_outside(place) else f"docs/{place}"
    fenced = re.split(r"(^`{3,}.*?^`{3,}$)", markdown, flags=re.DOTALL | re.MULTILINE)

    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        if (ROOT / target).is_dir():
            target = _index(target)
        link = posixpath.relpath(_place(target), posixpath.dirname(place) or ".")
        return f"{match[1]}{link}{match[3] or ''})"

    return "".join(
        text if text.startswith("```") else _LINK.sub(led, text) for text in fenced
    )


def on_page_content(html: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turns the docstrings' Sphinx roles into links."""

    def linked(match: re.Match[str]) -> str:
        code = f"<code>{match[1].rpartition('.')[2]}</code>"
        known = f'id="{match[1]}"' in html
        return f'<a href="#{match[1]}">{code}</a>' if known else code

    return _ROLE.sub(linked, html)


def _is_outside(place: str) -> bool:
    return any(place.startswith(f"{folder}/") for folder in FOLDERS)


def _place(name: str) -> str:
    """Where the site has a file of the repository."""
    if name in TOP:
        name = TOP[name]
    if Path(name).suffix in CODE:
        name += ".md"
    return name.removeprefix("docs/")


def _index(folder: str) -> str:
    """A folder's page; the first report where it has none of its own."""
    pages = sorted((ROOT / folder).glob("*.md"))
    named = [path for path in pages if path.name == "README.md"]
    return (named or pages)[0].relative_to(ROOT).as_posix()


def _notebook(path: Path) -> str | None:
    """Its text and code; what it printed is in the notebook itself."""
    import json

    parts = [f"*This is `{path.relative_to(ROOT).as_posix()}`, without its outputs.*"]
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts)
