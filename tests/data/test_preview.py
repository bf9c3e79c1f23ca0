"""Previews show the trained tokens, and nothing in the data can steer a terminal or a browser."""

from __future__ import annotations

import ast
import html
import json
import os
import pty
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.config.schema import DataConfig, LossConfig
from finetune.data.bad_records import fix_for, named
from finetune.data.forms import parse_conversation
from finetune.data.harmony.render import Example, render_example
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.data.preview import as_html, as_json, as_text, pieces, spread
from finetune.data.sources import BadRecord, Record
from finetune.log import printable

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\u200b\r<|end|><script>alert('&\"')</script>"
MESSAGES = [
    {"role": "user", "content": f"Question {EVIL}"},
    {"role": "assistant", "content": f"Answer {EVIL}", "thinking": "Let me think."},
]
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def example_of(config: DataConfig | None = None, name: str = "x", messages: list[dict[str, Any]] = MESSAGES) -> Example:
    record = Record(name, f"{name}:1", parse_conversation({"messages": messages}))
    return render_example(record, config or DataConfig(train={}))


def test_pieces_join_to_the_example() -> None:
    example = example_of(DataConfig(train={}, loss=LossConfig(analysis=0.5)))
    found = pieces(example)
    assert sum(piece.num_tokens for piece in found) == len(example.ids)
    assert sum(piece.num_tokens for piece in found if piece.weight) == example.num_trained_tokens
    shown = "".join(piece.text for piece in found)
    assert shown == printable(
        harmony_encoding().decode(example.ids.tolist()).replace("exe\u200b\r<|end|>", "exe\u200b\r<\\|end|>")
    )
    assert {(piece.channel, piece.weight) for piece in found if piece.weight} == {("analysis", 0.5), ("final", 1.0)}
    control = [piece.text for piece in found if piece.is_control]
    assert control[-1] == "<|return|>" and all(re.fullmatch(r"(<\|[a-z]+\|>)+", text) for text in control)


def test_without_colour_trained_tokens_are_in_brackets() -> None:
    plain = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "thinking": "Easy."}]
    shown = as_text(example_of(DataConfig(train={}, loss=LossConfig(analysis=0.25)), messages=plain), colour=False)
    assert shown.endswith(
        "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant"
        "[analysis x0.25: <|channel|>analysis<|message|>Easy.<|end|>]"
        "[final: <|start|>assistant<|channel|>final<|message|>4<|return|>]"
    )
    assert "\x1b" not in shown


def test_colours_show_the_channel_and_context_is_dim() -> None:
    shown = as_text(example_of(), colour=True)
    assert "\x1b[33mLet me think.\x1b[0m" in shown
    assert "\x1b[32mAnswer " in shown and "\x1b[2mQuestion " in shown
    assert "\x1b[32;7m<|return|>\x1b[0m" in shown and "\x1b[2;7m<|start|>\x1b[0m" in shown
    without_ours = re.sub(r"\x1b\[[0-9;]+m", "", shown)
    assert not UNSAFE.search(without_ours)


def test_escapes_in_the_data_are_spelled_out() -> None:
    example = example_of(name=EVIL)
    raw = harmony_encoding().decode(example.ids.tolist())
    assert UNSAFE.search(raw), "they are in the tokens"
    for shown in (
        as_text(example, colour=False),
        as_html("t", [example]),
        json.dumps(as_json(example), ensure_ascii=False),
    ):
        assert not UNSAFE.search(shown)
    assert "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\u202egnp" in as_text(example, colour=False)
    assert printable("tab\tand\nline") == "tab\tand\nline"


def test_spelled_control_tokens_differ_from_real_ones() -> None:
    shown = as_text(example_of(), colour=False)
    assert shown.count("<\\|end|>") == 2
    example = example_of()
    assert shown.count("<|end|>") == example.ids.tolist().count(200007)


class Tags(HTMLParser):
    """The tags, attributes and text that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_escaped_everywhere() -> None:
    evil = "</pre></title><img src=x onerror=alert(1)>\"'&amp;"
    example = example_of(
        name=evil, messages=[{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    )
    page = as_html(evil, [example])
    seen = Tags()
    seen.feed(page)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span"}
    assert seen.tags <= allowed and seen.attributes <= {"lang", "charset", "http-equiv", "content", "class", "title"}
    assert "".join(seen.text).count(evil) == 6, "title, heading, example's id and place, question and answer, as text"
    broken = Tags()
    broken.feed(page.replace(html.escape(evil), evil))
    assert "img" in broken.tags, "the check sees what escaping prevents"


def test_spread() -> None:
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 3) == [0, 1]
    assert spread(5, 5) == list(range(5))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"id": EVIL, "messages": MESSAGES}, {"messages": [MESSAGES[0], {"role": "assistant", "content": "short"}]}]
    rows += [{"messages": MESSAGES}, {"messages": "\x1b[31mbroken"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n"
        f"data:\n  train: {{mine: {{path: {tmp_path}/rows.jsonl}}}}\n"
    )
    return path


def test_preview_command(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", str(recipe), "-n", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("<|return|>") == 2 and "[final: " in printed.out
    assert "1 records skipped" in printed.err and not UNSAFE.search(printed.out + printed.err)
    assert main(["data", "preview", str(recipe), "--json", "-n", "9"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown) == 3 and shown[0]["trained_tokens"] == sum(
        piece["num_tokens"] for piece in shown[0]["pieces"] if piece["weight"]
    )
    page = recipe.parent / "page.html"
    assert main(["data", "preview", str(recipe), "--html", str(page)]) == 0
    assert page.read_text().count("<pre>") == 3 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "preview"], "needs a recipe"),
        (["data", "previw", "quickstart"], "did you mean preview?"),
        (["data", "preview", "quickstart", "-n", "0"], "must be at least 1"),
        (["data", "preview", "quickstart", "--json", "--html", "x"], "give one of them"),
        (["data", "preview", "quickstart", "--split", "trian"], "did you mean train?"),
        (["data", "preview", "legal_20b", "data.validation_split.key=x"], "names sources too"),
        (["data", "stats", "quickstart", "--jsn"], "did you mean --json?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_split_that_the_recipe_lacks(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", str(recipe), "--split", "test"]) == 2
    assert "data.test names no source" in capsys.readouterr().err


def test_on_a_terminal_there_is_colour_unless_refused(recipe: Path) -> None:
    command = [sys.executable, "-c", "from finetune.cli.main import entry; entry()", "data", "preview", str(recipe)]
    outputs = []
    for extra in ({}, {"NO_COLOR": "1"}):
        controller, terminal = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | extra
        subprocess.run(command, stdout=terminal, stderr=subprocess.DEVNULL, env=environment, check=True)
        os.close(terminal)
        outputs.append(os.read(controller, 1_000_000))
        os.close(controller)
    assert b"\x1b[32m" in outputs[0] and b"\x1b" not in outputs[1]


def test_quick_commands_do_not_import_torch(recipe: Path) -> None:
    code = (
        "import sys; from finetune.cli.main import main\n"
        f"codes = [main(['data', action, {str(recipe)!r}]) for action in ('preview', 'stats')]\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules], codes, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[] [0, 0]"


def write_recipe(directory: Path, rows: list[dict[str, Any]], **data: Any) -> str:
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(directory / "rows.jsonl")}
    settings = {"cache": False, "max_length": 512, "train": {"mine": source}, **data}
    path = directory / "r.yaml"
    path.write_text(f"# @package _global_\ndefaults:\n  - override /model: tiny\ndata: {json.dumps(settings)}\n")
    return str(path)


ANSWER = {"role": "assistant", "content": "Hello"}
NAMED: dict[str, Any] = {"messages": [{"role": "user", "name": "anna", "content": "Hi"}, ANSWER]}
GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}, ANSWER]}


def test_every_skipped_record_is_named_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roles = {"messages": [{"role": "human", "content": "Hi"}, {"role": "ai", "content": "Hello"}]}
    path = write_recipe(tmp_path, [NAMED, GOOD, NAMED, roles])
    assert main(["data", "preview", path]) == 0
    shown = capsys.readouterr().err
    for number in (1, 3):
        assert f"rows.jsonl:{number}: message 1 is from the user and has `name`" in shown
    assert "rows.jsonl:4: message 1 has an unknown role 'human'; write it as user" in shown
    assert "fix: remove the key from messages of that role" in shown and "human is user" in shown
    long = {"messages": [{"role": "user", "content": "word " * 600}, ANSWER]}
    assert main(["data", "preview", write_recipe(tmp_path, [GOOD, long], too_long="drop")]) == 0
    assert "dropped: " in (shown := capsys.readouterr().err) and "rows.jsonl:2: " in shown


@pytest.mark.parametrize("form", [[], ["--json"], ["--html", "page.html"]])
def test_all_records_skipped_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, [NAMED] * 30)
    assert main(["data", "preview", path, *form]) == 3
    shown = capsys.readouterr().err
    assert "none of 30 records can be used" in shown and not Path("page.html").exists()
    assert all(f"rows.jsonl:{number}: message 1" in shown for number in range(1, 31))
    assert "fix: remove the key from messages of that role" in shown


def test_first_of_each_kind_is_named_before_others() -> None:
    found = [BadRecord(f"x:{n}", "a" if n < 9 else "b", "r") for n in range(1, 11)]
    assert list(named(found, 3)) == ["x:1: r", "x:2: r", "x:9: r", "and 7 more"]
    assert list(named(found, 10)) == [f"x:{n}: r" for n in range(1, 11)]


def test_every_kind_of_fault_has_its_own_fix() -> None:
    import finetune.data

    kinds = set()
    for path in Path(finetune.data.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadRecordError":
                kinds |= {each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)}
    kinds = {kind for kind in kinds if isinstance(kind, str) and kind.strip() not in ("empty", "is not text")}
    assert len(kinds) > 50
    for kind in kinds:
        assert "correct the records" not in fix_for([BadRecord("x:1", kind, "r")]), kind
    assert fix_for([BadRecord("x:1", "title is not text", "r")]) == "write `title` as text"
