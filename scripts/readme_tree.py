"""Print the README's lines for finetune/: each module with the first paragraph of its docstring.

python scripts/readme_tree.py            prints the lines
python scripts/readme_tree.py --write    puts them into README.md between the tree's last fixed line and its fence
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ["config", "mxfp4", "kernels", "data", "model", "adapters", "evaluate", "train", "export", "report", "cli"]
LAST_FIXED_LINE = "  console.py            Plain lines and a progress line.\n"


def tree_lines() -> list[str]:
    """One line a package and one a module."""
    lines = []
    for layer in LAYERS:
        lines.append(f"  {layer}/")
        for path in sorted((ROOT / "finetune" / layer).glob("*.py")):
            if path.name != "__init__.py":
                text = ast.get_docstring(ast.parse(path.read_text())) or ""
                lines.append(f"    {path.name:<19} {' '.join(text.partition(chr(10) * 2)[0].split())}")
    return lines


def with_tree(readme: str) -> str:
    """The README with today's lines in it."""
    head, fixed, rest = readme.partition(LAST_FIXED_LINE)
    _, fence, tail = rest.partition("```\n")
    return head + fixed + "\n".join(tree_lines()) + "\n" + fence + tail


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(with_tree(readme.read_text()))
    else:
        print("\n".join(tree_lines()))
