"""Text that another template or channel would read as control is counted, shown, and moved or refused if asked."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.schema import DataConfig, SourceConfig, ThinkTags
from finetune.data.checks import BadRecordError
from finetune.data.control_text import ControlText, control_text_lines, count_control_text, split_thinking
from finetune.data.conversation import Conversation
from finetune.data.dataset import load_split
from finetune.data.forms import parse_conversation
from finetune.data.sources import Record, parse_record, raw_record
from finetune.files import JsonObject

QUESTION = {"role": "user", "content": "2+2?"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"


def answered(content: str, **fields: object) -> JsonObject:
    return {"messages": [QUESTION, {"role": "assistant", "content": content, **fields}]}


def counted(raw: JsonObject) -> dict[str, ControlText]:
    counts: dict[str, ControlText] = {}
    count_control_text(parse_conversation(raw), "x:1", counts)
    return counts


def parsed(raw: JsonObject, think_tags: ThinkTags) -> Conversation:
    return parse_record(raw_record("x:1", raw), "auto", think_tags).conversation


@pytest.mark.parametrize(
    ("kind", "spelling", "text"),
    [
        ("think_tags", "<think>", THOUGHT),
        ("think_tags", "<think>", "<think>\n\n</think>\n\n4"),
        ("think_tags", "</think>", "Two and two.\n</think>\n4"),
        ("think_tags", "<Thinking>", " <Thinking>Two</thinking>4"),
        ("think_tags", "[THINK]", "[THINK]Two[/THINK]4"),
        ("think_tags", "<|begin_of_thought|>", "<|begin_of_thought|>Two<|end_of_thought|>4"),
        ("other_think_tags", "<think>", "<think>never closed"),
        ("other_think_tags", "<reasoning>", "4, since <reasoning>two and two</reasoning>"),
        ("harmony", "<|end|>", "4<|end|>"),
        ("harmony", "<|reserved_200013|>", "4<|reserved_200013|>"),
        ("template", "<|im_end|>", "4<|im_end|>\n"),
        ("template", "<|start_header_id|>", "4<|start_header_id|>user"),
        ("template", "<|eot_id|>", "4<|eot_id|>"),
        ("template", "<start_of_turn>", "<start_of_turn>model\n4"),
        ("template", "<turn|>", "4<turn|>"),
        ("template", "[/INST]", "[/INST] 4"),
        ("template", "<<SYS>>", "<<SYS>>Be brief.<</SYS>> 4"),
        ("template", "<s>", "<s>4"),
        ("template", "</s>", "4 </s>\n"),
        ("template", "</s>", "4</s>And then?"),
        ("template", "<s>", "<s>4</s>"),
        ("template", "<|/answer|>", "4<|/answer|>"),
        ("headings", "USER:", "A chat. USER: Hi ASSISTANT: Hello"),
        ("template", "<｜Assistant｜>", "<｜Assistant｜>4"),
        ("template", "<|user|>", "4<|user|>"),
        ("tool_calls", "<tool_call>", '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'),
        ("tool_calls", "<function=add>", "<function=add>{}</function>"),
        ("tool_calls", "[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "add"}]'),
        ("tool_calls", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}'),
        ("headings", "### Instruction:", "### Instruction:\nAdd.\n\n### Response:\n4"),
        ("headings", "### Human:", "### Human: Add.\n### Assistant: 4"),
    ],
)  # fmt: skip
def test_each_kind_is_found(kind: str, spelling: str, text: str) -> None:
    assert counted({**answered(text), "tools": [TOOL]}) == {kind: ControlText(1, "x:1", spelling)}
    if not kind.startswith("think") and not text.startswith("{"):
        assert counted({"text": text}) == {kind: ControlText(1, "x:1", spelling)}, "in plain text too"


@pytest.mark.parametrize(
    "text",
    [
        "4", "a < b > c", "f <| g |> h", "x |> f", "let y = [1, 2]", "<b>4</b>",
        "an <s>old</s> price", "<s>old</s> new", "USER: ?", "I think so.",
        "Answer: 4", "## Response\n4", '{"name": "someone", "age": 3}', "{broken", "<tools>", "| a | b |", "[INSTALL]",
    ],
)  # fmt: skip
def test_ordinary_text_is_not_counted(text: str) -> None:
    assert counted({**answered(text), "tools": [TOOL]}) == {}


def test_a_users_question_about_tags_is_no_thinking() -> None:
    asked = {"role": "user", "content": "What does <think> mean in <think>x</think>?"}
    assert counted({"messages": [asked, {"role": "assistant", "content": "Thinking."}]}) == {}


def test_every_text_of_a_record_counts_once() -> None:
    evil = "<|end|>"
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": evil}}}
    texts: list[JsonObject] = [
        {"messages": [{"role": "system", "content": evil}, QUESTION, {"role": "assistant", "content": "4"}]},
        {"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": "4"}]},
        answered("4", thinking=evil),
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]},
        {**answered("4"), "tools": [{"type": "function", "function": {"name": "f", "description": evil}}]},
        {**answered("4"), "model_identity": evil},
        {"prompt": "2+2?", "chosen": "4", "rejected": evil},
    ]
    counts: dict[str, ControlText] = {}
    for number, raw in enumerate(texts, start=1):
        count_control_text(parse_conversation(raw), f"x:{number}", counts)
    assert counts == {"harmony": ControlText(len(texts), "x:1", "<|end|>")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT, ("Two and two.", "4")),
        ("◁think▷a◁/think▷b", ("a", "b")),
        ("[THINK]a[/THINK]b", ("a", "b")),
        ("<think>\n\n</think>\n\n4", ("", "4")),
        ("Two.\n</think>\n4", ("Two.", "4")),
        ("<THINK>a</think>b</think>", ("a", "b</think>")),
        ("<seed:think>a</seed:think>b", ("a", "b")),
        ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>b<|end_of_solution|>", ("a", "b")),
        ("<think>a", None),
        ("<think>a</thinking>", None),
        ("4", None),
    ],
)
def test_thinking_is_cut_off(text: str, expected: tuple[str, str] | None) -> None:
    assert split_thinking(text) == expected


def test_move_equals_thinking_given_as_such() -> None:
    moved, given = parsed(answered(THOUGHT), "move"), parsed(answered("4", thinking="Two and two."), "keep")
    assert moved.messages == given.messages and moved.has_moved_thinking and not given.has_moved_thinking
    assert parsed(answered(THOUGHT, thinking="Two and two."), "move").messages == given.messages
    assert parsed(answered("4", thinking="<think>Two and two.</think>"), "move").messages == given.messages
    assert parsed(answered("<think> </think>4"), "move").messages == parsed(answered("4"), "keep").messages
    assert parsed(answered(THOUGHT), "keep").messages[1].content == THOUGHT
    pair = parsed({"prompt": "2+2?", "chosen": THOUGHT, "rejected": "<think>One.</think>5"}, "move")
    assert [answer.messages[-1].thinking for answer in pair.answers] == ["Two and two.", "One."]
    assert pair.messages[-1] == pair.answers[0].messages[-1] == given.messages[-1]


@pytest.mark.parametrize(
    ("raw", "think_tags", "reason"),
    [
        (answered(THOUGHT), "refuse", "message 2 begins with <think>: give it as `thinking`"),
        (answered(THOUGHT, thinking="Other."), "move", "other thinking beside them"),
        (answered("<think>a</think>\n"), "move", "nothing behind its thinking"),
        (answered("<|channel|>analysis<|message|>Two.<|end|>"), "keep", "rendered already"),
        (answered("<|start|>assistant<|channel|>final<|message|>4"), "keep", "rendered already"),
        (answered("4", thinking="<|channel|>analysis<|message|>Two."), "keep", "thinking begins with"),
        ({"text": "<|start|>system<|message|>You are"}, "keep", "the text begins with"),
        ({"prompt": "q", "chosen": "4", "rejected": "<|channel|>final<|message|>5"}, "keep", "rendered already"),
    ],
)
def test_what_is_certain_is_refused(raw: JsonObject, think_tags: ThinkTags, reason: str) -> None:
    with pytest.raises(BadRecordError, match=reason):
        parsed(raw, think_tags)


def test_text_about_harmony_is_trained() -> None:
    assert parsed(answered("A message is <|start|>assistant<|message|>text<|end|>."), "keep").messages
    asked = {"role": "user", "content": "<|channel|>final<|message|>?"}
    assert parsed({"messages": [asked, {"role": "assistant", "content": "4"}]}, "keep").messages


def recipe(directory: Path, rows: list[JsonObject], **data: object) -> Path:
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"cache": False, "max_length": 512, "train": {"mine": {"path": str(directory / "rows.jsonl")}}, **data}
    path = directory / "r.yaml"
    path.write_text(f"# @package _global_\ndefaults:\n  - override /model: tiny\ndata: {json.dumps(settings)}\n")
    return path


def test_every_command_warns(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(tmp_path, [answered(THOUGHT), answered("4<|im_end|>"), answered("4")]))
    thinking, template = "1 record with an answer that begins with thinking in tags", "first <|im_end|> in"
    for command in (["data", "preview", path], ["train", path, f"model.path={tiny_base}", "--dry-run"]):
        assert main(command) == 0
        shown = capsys.readouterr().err
        assert f"warning: data.train: {thinking}" in shown and template in shown and "data.think_tags=move" in shown
    assert main(["data", "stats", path]) == 0
    shown = capsys.readouterr().out
    assert f"warning: {thinking}" in shown and template in shown
    assert main(["data", "stats", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["control_text"]["template"]["num_records"] == 1
    assert main(["recipes", "new", str(tmp_path / "new.yaml"), "--data", str(tmp_path / "rows.jsonl")]) == 0
    shown = capsys.readouterr().err
    assert "the recipe makes it the messages' `thinking`" in shown and template in shown
    written = compose(str(tmp_path / "new.yaml")).config.data
    assert (written.think_tags, written.reasoning_effort) == ("move", "medium")


def test_moved_thinking_is_counted_and_survives_the_cache(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(answered(THOUGHT)) + "\n")
    config = DataConfig(
        train={"mine": SourceConfig(path=str(tmp_path / "rows.jsonl"))}, think_tags="move", cache_dir=str(tmp_path)
    )
    for _ in range(2):
        split = load_split(config, "train")
        assert split.stats.num_moved_thinking == 1 and not split.stats.control_text
        record = split.records[0]
        assert isinstance(record, Record) and record.messages[1].thinking == "Two and two."
    kept = DataConfig(train=config.train, cache_dir=str(tmp_path))
    for _ in range(2):
        (line,) = control_text_lines(load_split(kept, "train").stats.control_text)
        assert line.startswith("1 record with an answer that begins")


THINK = ["think", "thinking", "Thought", "thoughts", "reasoning", "reflection", "scratchpad", "THINK", "seed:think"]
SPELLINGS = {
    "harmony": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
                "<|endoftext|>", "<|startoftext|>", "<|endofprompt|>", "<|reserved_200000|>"],
    "template": ["<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>",
                 "<|eom_id|>", "<|python_tag|>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>",
                 "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|start_of_role|>", "<|im_middle|>", "<|endofturn|>",
                 "<|fim_prefix|>", "<|tool_calls_section_begin|>", "<|turn>", "<turn|>", "<start_of_turn>",
                 "<end_of_turn>", "<bos>", "<eos>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]",
                 "[gMASK]", "<sop>", "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
    "tool_calls": ["<tool_call>", "</tool_call>", "<tool_response>", "<tool_calls>", "<function_call>",
                   "<functioncall>", "<function=f>", '<invoke name="f">', "[TOOL_CALLS]", "[TOOL_RESULTS]"],
}  # fmt: skip
TEXTS = strategies.text(strategies.characters(codec="utf-8", exclude_characters="<>[]|#\uff5c"), max_size=40)


@given(strategies.sampled_from(THINK), TEXTS, TEXTS.filter(str.strip), TEXTS.map(lambda text: " " * (len(text) % 5)))
@settings(max_examples=100, deadline=None)
def test_any_tags_around_any_thinking(tag: str, thinking: str, answer: str, space: str) -> None:
    raw = answered(f"{space}<{tag}>{thinking}</{tag}>{space}{answer}")
    without = answered(answer.strip(), **({"thinking": thinking.strip()} if thinking.strip() else {}))
    assert parsed(raw, "move").messages == parsed(without, "keep").messages
    assert counted(raw).keys() == {"think_tags"} and not counted(without)


@given(strategies.sampled_from([(kind, text) for kind, texts in SPELLINGS.items() for text in texts]), TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_any_spelling_anywhere(found: tuple[str, str], before: str, after: str) -> None:
    kind, spelling = found
    text = f"{before}{spelling}{after}"
    asked = {"messages": [QUESTION | {"content": text}, {"role": "assistant", "content": "4"}]}
    for raw in (answered(text), answered("4", thinking=text), {"text": text}, asked):
        assert counted(raw).keys() == {kind}, raw


def test_long_hostile_texts_take_linear_time() -> None:
    started = time.process_time()
    for text in ("<|a" * 10**5, "<think>" * 10**5, "[INST" * 10**5, "</s>" + " " * 10**6 + "x", "\n#" * 10**5):
        counted(answered(text + "."))
    assert time.process_time() - started < 5
