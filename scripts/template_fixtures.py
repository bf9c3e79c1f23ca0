"""Write tests/fixtures/template_fixtures.jsonl: random conversations as rendered by the published Jinja template.

    python scripts/template_fixtures.py TEMPLATE

TEMPLATE is `chat_template.jinja` of openai/gpt-oss-20b, or the same file as `trl/chat_templates/gptoss.jinja` in PyPI's
trl 1.16.0 (pip download --no-deps trl==1.16.0). The template itself is not kept here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "template_fixtures.jsonl"
sys.path.insert(0, str(ROOT / "tests"))

from conversations import SCHEMA_RECORD, Maker  # noqa: E402
from template_oracle import Template  # noqa: E402


def main(path: str) -> None:
    """Render records and write one line each: the record, and both texts."""
    template = Template(Path(path))
    maker = Maker(seed=7, for_template=True)
    records = [SCHEMA_RECORD, *(maker.record() for _ in range(60))]
    lines = [
        json.dumps({"record": record, "training": template.training(record), "prompt": template.prompt(record)})
        for record in records
    ]
    FIXTURES.write_text("\n".join(lines) + "\n")
    print(f"{FIXTURES.relative_to(ROOT)}: {len(lines)} records, {FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
