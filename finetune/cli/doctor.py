"""`finetune doctor`: checks of this machine, with fixes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from finetune import log
from finetune.cli.arguments import add_examples
from finetune.errors import MachineError

# Mark and colour of each status.
_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "bad": ("BAD", "bold red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_examples(parser, "finetune doctor", "finetune doctor --json")


def run(args: argparse.Namespace) -> None:
    """Print all findings.

    Raises:
        MachineError: at least one is bad.
    """
    from finetune.doctor import examine

    findings = examine()
    if args.json:
        log.result(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        rows, colors = [], []
        for finding in findings:
            mark, color = _MARKS[finding.status]
            rows.append((mark, finding.name, finding.found))
            rows += [("", "", f"-> {finding.fix}")] if finding.fix else []
            colors += [color, ""] if finding.fix else [color]
        log.result_table(rows, colors)
    bad = [finding.name for finding in findings if finding.status == "bad"]
    if bad:
        raise MachineError(f"{len(bad)} of {len(findings)} checks are bad: {', '.join(bad)}", fix="see the list above")
