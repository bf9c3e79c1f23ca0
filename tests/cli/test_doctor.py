"""`finetune doctor`: status of each finding, and independent checks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from packaging.requirements import Requirement

from finetune import doctor as checks
from finetune.cli.main import main
from finetune.doctor import Finding, check_hub, package_finding

NAMES = {
    "python",
    "torch",
    "transformers",
    "expert kernel",
    "attention kernel",
    "memory",
    "disk, runs",
    "hub",
    "tokenizer",
}


def test_every_part_of_the_machine_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert {finding["name"] for finding in findings} >= NAMES
    assert all(finding["fix"] for finding in findings if finding["status"] != "ok")
    assert code == (5 if any(finding["status"] == "bad" for finding in findings) else 0)


@pytest.mark.parametrize(
    ("requirement", "version", "needed", "status"),
    [
        ("torch>=2.11", "2.13.0+cpu", True, "ok"),
        ("torch>=2.11", "2.10.0", True, "bad"),
        ("transformers>=5.17,<6", "6.0.1", True, "bad"),
        ("peft>=0.19", "0.19.0", True, "note"),
        ("wandb", None, False, "note"),
        ("peft>=0.19.1", None, True, "bad"),
    ],
)
def test_package_versions(requirement: str, version: str | None, needed: bool, status: str) -> None:
    finding = package_finding(Requirement(requirement), version, needed=needed)
    assert finding.status == status
    assert (finding.fix is None) == (status == "ok")


def test_a_failing_check_is_a_finding_with_exit_code_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_tokenizer() -> Iterator[Finding]:
        raise RuntimeError("no vocabulary")

    monkeypatch.setattr(checks, "check_tokenizer", check_tokenizer)
    assert main(["doctor"]) == 5
    printed = capsys.readouterr()
    assert "RuntimeError: no vocabulary" in printed.out and "python" in printed.out
    assert "tokenizer" in printed.err


@pytest.mark.parametrize(("answer", "status"), [(200, "ok"), (401, "ok"), (503, "note"), (None, "note")])
def test_the_hub_is_probed(monkeypatch: pytest.MonkeyPatch, answer: int | None, status: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer or 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    if answer is None:
        server.shutdown()
        server.server_close()
    (finding,) = check_hub()
    assert finding.status == status
    if answer is not None:
        server.shutdown()
        server.server_close()


def test_offline_mode_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [finding.found for finding in check_hub()] == ["HF_HUB_OFFLINE is set"]
