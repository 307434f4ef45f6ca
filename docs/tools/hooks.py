"""What mkdocs.yml cannot say: decisions and public names are listed as they are found."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
DECISIONS = REPOSITORY / "docs" / "decisions"
_CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>.*?</code>", re.DOTALL)


def decisions() -> list[tuple[str, str]]:
    """Return (file name, title) of every decision, in order of their numbers."""
    pages = sorted(path for path in DECISIONS.glob("[0-9]*.md"))
    return [(path.name, path.read_text().splitlines()[0].removeprefix("# ")) for path in pages]


def public_names(package: str) -> list[str]:
    """Return a package's `__all__`, read and not imported."""
    source = REPOSITORY.joinpath(*package.split("."), "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{package} has no __all__")


def on_page_content(html: str, **_: Any) -> str:
    r"""Write `a|b` in tables' code: GitHub needs `a\|b` there, and Python-Markdown leaves it so."""
    return _CELL.sub(lambda cell: _CODE.sub(_without_backslashes, cell[0]), html)


def _without_backslashes(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """List the decisions on their page, and packages' public names in the reference."""
    if page.file.src_uri == "api.md":
        return re.sub(
            r"<!-- all of (\S+) -->",
            lambda found: "\n\n".join(f"::: {found[1]}.{name}" for name in public_names(found[1])),
            markdown,
        )
    if page.file.src_uri != "decisions/index.md":
        return markdown
    return f"{markdown}\n" + "".join(f"- [{title}]({name})\n" for name, title in decisions())
