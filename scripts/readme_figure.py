"""Put a run's three expert heat maps (before, after, change) side by side into docs/images/experts.svg.

python scripts/readme_figure.py runs/quickstart-...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "experts.svg"


def side_by_side(figures: list[str]) -> str:
    """Nest SVG documents in one, from left to right."""
    sizes = [tuple(map(int, re.search(r'width="(\d+)" height="(\d+)"', text).groups())) for text in figures]  # type: ignore[union-attr]
    width, height = sum(size[0] for size in sizes), max(size[1] for size in sizes)
    parts, left = [], 0
    for text, (own, _) in zip(figures, sizes, strict=True):
        parts.append(text.strip().replace("<svg ", f'<svg x="{left}" y="0" ', 1))
        left += own
    label = "Use of the experts before and after training, and the change"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join([f'{head} role="img" aria-label="{label}">', f"<title>{label}</title>", *parts, "</svg>\n"])


def main() -> int:
    run = Path(sys.argv[1])
    figures = [
        (run / "figures" / f"experts_{name}.svg").read_text(encoding="utf-8") for name in ("before", "after", "change")
    ]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(side_by_side(figures), encoding="utf-8")
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
