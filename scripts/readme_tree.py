"""Write the README's tree: a line per file, each with what the file says of itself.

python scripts/readme_tree.py            prints the lines
python scripts/readme_tree.py --write    puts them into README.md, between `## Tree` and the end of its block
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = {
    "pyproject.toml": "the package: dependencies, what the wheel holds, settings of ruff, mypy and pytest",
    "constraints.txt": "the exact versions that the tests ran with",
    "Makefile": "`make` lists its targets",
    ".ci/run": "what continuous integration runs",
    "CHANGELOG.md": "what changed for users",
    "LICENSE": "Apache-2.0",
}
FOLDERS = ["recipes", "configs", "data", "docs", "bench", "scripts", "finetune", "tests"]
LAYERS = [
    "", "config", "mxfp4", "kernels", "data", "model", "adapters", "evaluate", "train", "export", "estimate", "doctor",
    "report", "cli",
]  # fmt: skip
KINDS = (".py", ".yaml", ".md", ".gz", ".tiktoken", ".json")
SKIPPED = ("__pycache__", "fixtures", "_shipped", "results")


def tree() -> str:
    """The whole block, without its fences."""
    lines = [_line(name, text, 0) for name, text in TOP.items()]
    for folder in FOLDERS:
        lines += _folder(ROOT / folder, 0)
    return "\n".join(lines) + "\n"


def with_tree(readme: str) -> str:
    """The README with today's tree in it."""
    head, heading, rest = readme.partition("## Tree\n```\n")
    _, fence, tail = rest.partition("```\n")
    return head + heading + tree() + fence + tail


def _folder(folder: Path, depth: int) -> list[str]:
    """The folder's own files, then its folders."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in KINDS and path.name != "__init__.py"]
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in SKIPPED]
    if folder.name == "finetune":
        below.sort(key=lambda path: LAYERS.index(path.name))
    lines = [f"{'  ' * depth}{folder.name}/"]
    lines += [_line(path.name, _own_words(path), depth + 1) for path in files]
    return lines + [line for path in below for line in _folder(path, depth + 1)]


def _line(name: str, text: str, depth: int) -> str:
    return f"{'  ' * depth}{name:<{30 - 2 * depth}} {text}".rstrip()


def _own_words(path: Path) -> str:
    """The first paragraph of a module's docstring, a recipe's first comment, a document's title."""
    match path.suffix:
        case ".py":
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            return " ".join(text.partition("\n\n")[0].split())
        case ".yaml":
            comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            return next((line for line in comments if not line.startswith("@")), "")
        case ".md":
            title = re.search(r"^# (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            return title[1] if title else ""
        case _:
            return "see data/LICENSES.md"


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(with_tree(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tree(), end="")
