"""The errors and warnings that the package can say, read off its source.

    python docs/tools/messages.py            # those that docs/errors.md lacks, and those gone
    python docs/tools/messages.py --write    # bring its lists up to date
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/errors.md"
# Their texts reach the user, alone or within another message.
_SAYS = re.compile(
    r"(Error|Warning|warn|warnings\.once|Broken|Unlike|Untraceable|NotPlain|Report)$"
)
_ENTRY = re.compile(r'^- <a id="([\w-]+)"></a>(`+) ?(.*?) ?\2$', flags=re.MULTILINE)
_LIST = re.compile(r"<!-- messages: (.*?) -->\n.*?<!-- end -->\n", flags=re.DOTALL)


class Message(NamedTuple):
    file: str  # within the package
    text: str  # an ellipsis stands for what is filled in


def messages() -> list[Message]:
    """Every message once, in the order of the source."""
    found: dict[str, Message] = {}
    for path in sorted((ROOT / "kd_balance").rglob("*.py")):
        for text in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            name = path.relative_to(ROOT / "kd_balance").as_posix()
            found.setdefault(text, Message(name, text))
    return list(found.values())


def anchor(text: str) -> str:
    """A short id made of the message's first words."""
    words = re.findall(r"[a-z0-9_]+", text.lower().replace("'", ""))
    return "-".join(words[:8]).replace("_", "-").strip("-")


def written(page: str) -> dict[str, str]:
    """The messages on the page and their anchors."""
    return {text: name for name, _, text in _ENTRY.findall(page)}


def filled(page: str) -> str:
    """The page with its lists as the source has them."""
    left = {message.text: message for message in messages()}
    names: set[str] = set()

    def entries(match: re.Match[str]) -> str:
        globs = match[1].split()
        lines = []
        for text, message in list(left.items()):
            if any(fnmatchcase(message.file, glob) for glob in globs):
                del left[text]
                lines.append(_entry(text, names))
        return f"<!-- messages: {match[1]} -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->\n"

    page = _LIST.sub(entries, page)
    if left:
        files = sorted({message.file for message in left.values()})
        raise SystemExit(f"No list of {PAGE.name} takes the messages of {', '.join(files)}.")
    return page


def _entry(text: str, names: set[str]) -> str:
    name = stem = anchor(text)
    number = 1
    while name in names:
        number += 1
        name = f"{stem}-{number}"
    names.add(name)
    fence = "``" if "`" in text else "`"
    gap = " " if "`" in text else ""
    return f'- <a id="{name}"></a>{fence}{gap}{text}{gap}{fence}'


def _texts(tree: ast.AST, says: bool = False) -> Iterator[str]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        text = _literal(child)
        if text is None:
            called = isinstance(child, ast.Call) and _SAYS.search(ast.unparse(child.func))
            yield from _texts(child, says or bool(called))
            continue
        text = " ".join(text.split())
        if len(re.findall(r"[a-z]{2,}", text)) > 2 and (says or "expected " in text):
            yield text


def _literal(node: ast.AST) -> str | None:
    """A string's text, with an ellipsis for each hole."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^}]*\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="bring the page up to date")
    page = PAGE.read_text(encoding="utf-8")
    if parser.parse_args().write:
        PAGE.write_text(filled(page), encoding="utf-8")
        return
    there, told = {message.text for message in messages()}, written(page)
    print(*(f"missing: {text}" for text in sorted(there - told.keys())), sep="\n")
    print(*(f"gone: {text}" for text in sorted(told.keys() - there)), sep="\n")


if __name__ == "__main__":
    main()
