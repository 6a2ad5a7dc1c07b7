"""Hooks of the documentation site: what MkDocs does differently from GitHub, where the same pages are read.

- Links to files outside docs/ lead to the repository, if REPOSITORY_URL is set; otherwise they are plain text.
- Links to pages whose text is a file name have the page's title as their text.
- CHANGELOG.md and CONTRIBUTING.md are pages of the site, and README.md is its home page.
- `<!-- options: NAME -->` becomes tables of the options of a dataclass in flexpg/training/config.py.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "flexpg/training/config.py"
# Files of the repository that are pages under another name.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#]+)(#[^)]*)?\)")
LITERALS = {
    f"`{name}`": f"flexpg.losses.{name}" for name in ("LossType", "ImportanceSamplingLevel", "ImportanceSamplingMode")
}
LITERALS["`ScaleRewards`"] = "flexpg.advantages.ScaleRewards"
OPTIONS = re.compile(r"<!-- options: (\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose source is not in docs/."""
    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links and fill in the tables of options."""
    uri = page.file.src_uri
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    source = next((name for name, page in PAGES.items() if page == uri and page != "index.md"), f"docs/{uri}")

    def rewrite(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = normpath(f"{PurePosixPath(source).parent}/{target}")
        inside = PAGES.get(path) or path.removeprefix("docs/")
        file = files.get_file_from_path(inside) if path in PAGES or path.startswith("docs/") else None
        if file is not None and file.inclusion.is_included():
            text = _title(ROOT / path) if text.endswith(PurePosixPath(path).name) else text
            return f"[{text}]({relpath(inside, PurePosixPath(uri).parent)}{anchor})"
        if not (ROOT / path).exists():
            return found[0]  # reported by MkDocs
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text if PurePosixPath(path).name in text else f"{text} (`{path}`)"

    return OPTIONS.sub(lambda found: option_tables(found[1]), LINK.sub(rewrite, markdown))


def _title(path: Path) -> str:
    return path.read_text().partition("# ")[2].partition("\n")[0]


def option_tables(name: str) -> str:
    """Return the options of a dataclass as tables, one for each comment line above a group of options."""
    text = CONFIG.read_text()
    (node,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    lines, written = text.splitlines(), []
    for field, previous in zip(fields, [node, *fields], strict=False):
        above = [line.strip() for line in lines[previous.lineno : field.lineno - 1]]
        comment = next((line[2:] for line in above if line.startswith("# ")), "")
        if comment or not written:
            heading, _, rest = comment.partition(": ")
            written += [f"\n### {heading}\n"] if heading else []
            written += [f"{rest}.\n"] if rest else []
            written += ["| option | type | default | meaning |\n| --- | --- | --- | --- |"]
        written.append(_row(field, lines))
    return "\n".join(written) + "\n"


def _row(field: ast.AnnAssign, lines: list[str]) -> str:
    comments = [lines[n].partition("  # ")[2] for n in range(field.lineno - 1, field.end_lineno)]
    meaning = " ".join(filter(None, comments)).replace("_", "\\_").replace("|", "\\|")
    meaning = re.sub(r"docs/(\w+\.md)", r"[\1](../\1)", meaning)
    kind = f"`{ast.unparse(field.annotation)}`"
    kind = f"[{kind}][{LITERALS[kind]}]" if kind in LITERALS else kind
    return f"| `{ast.unparse(field.target)}` | {kind} | {_default(field)} | {meaning} |"


def _default(field: ast.AnnAssign) -> str:
    """Return a default as a YAML shows it: what a factory makes."""
    value = ast.unparse(field.value)
    if value == "MISSING":
        return "required"
    made = re.fullmatch(r"field\(default_factory=(?:lambda: )?(.*)\)", value, re.DOTALL)
    if made is None or made[1].startswith("{"):
        return f"`{value if made is None else made[1]}`"
    return "`{}`" if made[1] == "dict" else "below"
