"""`finetune doctor`: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from finetune import log
from finetune.cli.arguments import add_examples
from finetune.errors import MachineError

_MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_examples(parser, "finetune doctor", "finetune doctor --json")


def run(args: argparse.Namespace) -> None:
    """Print what was found.

    Raises:
        MachineError: something is bad; all findings are printed first.
    """
    from finetune.doctor.checks import examine

    findings = examine()
    if args.json:
        log.result(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            log.result(f"{_MARKS[finding.status]}  {finding.name:{width}}  {finding.found}")
            if finding.fix:
                log.result(f"      {'':{width}}  -> {finding.fix}")
    bad = [finding.name for finding in findings if finding.status == "bad"]
    if bad:
        raise MachineError(f"{len(bad)} of {len(findings)} checks are bad: {', '.join(bad)}", fix="see the list above")
