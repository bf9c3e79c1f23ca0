"""Generation with a KV cache, against transformers' own generate and against forward passes over whole sequences."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config

from finetune.cli.main import main
from finetune.data.harmony.encode import encode_text, header_ids
from finetune.data.harmony.render import render_answer
from finetune.data.harmony.tokenizer import CALL_ID, END_ID, END_OF_TEXT_ID, MESSAGE_ID, RETURN_ID, START_ID
from finetune.evaluate.generation import STOP_IDS, Sampling, choose_tokens, generate, read_completion
from finetune.kernels.cache import KeyValueCache
from finetune.model.build import Base, build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.decoding import Decoder
from finetune.model.forward import logits
from finetune.model.noise import rounding_noise

# The window is 128: one prompt is longer, one crosses it while it is continued, one is a single token.
LENGTHS = (5, 200, 1, 120)
NUM_NEW = 20


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, 16)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 199_000, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def greedy(base: Base, prompts: list[list[int]]) -> list[list[int]]:
    return generate(base.model, prompts, Sampling(max_tokens=NUM_NEW))


def test_greedy_tokens_equal_transformers(tiny_base: Path, prompts: list[list[int]], greedy: list[list[int]]) -> None:
    reference: GptOssForCausalLM = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    ).eval()
    for prompt, ours in zip(prompts, greedy, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NUM_NEW, do_sample=False
        )
        assert ours == theirs[0, len(prompt) :].tolist()


def hidden_after(base: Base, prompts: list[list[int]], following: list[list[int]]) -> torch.Tensor:
    """Hidden states of the last token of each prompt + its following tokens, read one by one."""
    decoder = Decoder(base.model, prompts, NUM_NEW)
    hidden = decoder.read_prompts()
    for tokens in zip(*following, strict=True):
        hidden = decoder.read(torch.tensor(tokens))
    return hidden


def test_logits_equal_those_of_the_whole_sequence(
    base: Base, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    stepwise = base.model.lm_head(hidden_after(base, prompts, greedy))
    for row, prompt, following in zip(stepwise, prompts, greedy, strict=True):
        with torch.no_grad():
            whole = partial(logits, base.model, torch.tensor(prompt + following))
            assert (row - whole()[-1]).abs().max() <= rounding_noise(base.model, whole) < 1e-2


def test_a_cache_without_its_window_is_noticed(
    base: Base, prompts: list[list[int]], greedy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hidden_after(base, prompts, greedy)
    limit = rounding_noise(base.model, partial(hidden_after, base, prompts, greedy))
    made = KeyValueCache.__init__

    def without_window(self: KeyValueCache, layers, sequences, longest, window, *rest):  # type: ignore[no-untyped-def]
        made(self, layers, sequences, longest, None, *rest)

    monkeypatch.setattr(KeyValueCache, "__init__", without_window)
    difference = (hidden_after(base, prompts, greedy) - right).abs().amax(1)
    assert difference[0] <= limit  # 25 tokens: the window is never full
    assert min(difference[1], difference[3]) > 10 * limit


def test_a_batch_equals_each_prompt_alone(base: Base, prompts: list[list[int]]) -> None:
    sampling = Sampling(max_tokens=6, temperature=0.7, top_p=0.9, seed=4)
    together = generate(base.model, prompts[:1] * 2, sampling)
    assert generate(base.model, prompts[:1], sampling) == together[:1]
    assert together[0] != together[1]  # the same prompt, another generator
    assert generate(base.model, prompts[:1], Sampling(max_tokens=6, temperature=0.7, seed=5)) != together[:1]


def test_a_finished_sequence_does_not_change_the_others(
    base: Base, prompts: list[list[int]], greedy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = greedy[1][3]
    monkeypatch.setattr("finetune.evaluate.generation.STOP_IDS", STOP_IDS | {stop})
    streamed: dict[int, list[int]] = {}
    found = generate(
        base.model, prompts, Sampling(max_tokens=NUM_NEW), lambda n, token: streamed.setdefault(n, []).append(token)
    )
    assert [streamed[number] for number in range(len(prompts))] == found
    for ours, whole in zip(found, greedy, strict=True):
        assert ours == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(found[1]) <= 4


def test_top_p_keeps_the_likeliest_and_temperature_flattens() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draw = [torch.Generator().manual_seed(seed) for seed in range(400)]

    def drawn(sampling: Sampling) -> torch.Tensor:
        tokens = choose_tokens(scores.expand(len(draw), -1), draw, sampling)
        return torch.bincount(torch.tensor(tokens), minlength=4) / len(draw)

    assert choose_tokens(scores, draw[:1], Sampling()) == [0]
    assert drawn(Sampling(temperature=1.0, top_p=0.6))[0] == 1  # 0.64 alone is enough
    assert drawn(Sampling(temperature=1.0, top_p=0.8))[2:].sum() == 0
    expected = (scores[0] / 2).softmax(-1)
    assert (drawn(Sampling(temperature=2.0)) - expected).abs().max() < 0.08  # 3 standard deviations of 400 draws


def test_completions_are_parsed_as_harmony() -> None:
    whole = read_completion(render_answer("Yes — of course", thinking="It says so."))
    assert (whole.final, whole.analysis, whole.stopped, whole.error) == ("Yes — of course", "It says so.", True, None)
    for length in range(len(THOUGHT)):
        assert read_completion(THOUGHT[:length]).error is None, "being cut is no fault, wherever"
    cut = read_completion(render_answer("Yes")[:-1])
    assert (cut.final, cut.stopped, cut.error) == ("Yes", False, None)


THOUGHT, YES, BODY = render_answer("Yes", thinking="It says so."), render_answer("Yes"), render_answer("Yes")[:-1]
HEADER, THINKING = header_ids("assistant", "final")[2:], header_ids("assistant", "analysis")[2:]
CALL = [*header_ids("assistant to=functions.look", "commentary", "json")[2:], *encode_text("{}"), CALL_ID]
TOLD = [*header_ids("functions.look to=assistant", "commentary"), *encode_text("3"), END_ID]


@pytest.mark.parametrize(
    ("tokens", "wrong"),
    [
        ([RETURN_ID], ""),
        ([*BODY, END_ID, 17, 17], ""),  # text outside a message
        ([*encode_text("A"), *YES], ""),
        ([*BODY, *header_ids("assistant", "final"), *encode_text("No"), RETURN_ID], r"<\|start\|> inside"),
        ([*BODY, *YES], r"<\|channel\|> inside"),
        ([*BODY, 200013, RETURN_ID], "inside a message"),
        ([*BODY, 199998], "inside a message"),  # cut, and wrong all the same
        ([END_OF_TEXT_ID], "endoftext"),
        ([*BODY, END_OF_TEXT_ID], "endoftext"),
        ([*THINKING, *encode_text("Hm"), END_OF_TEXT_ID], "endoftext"),
        ([*THINKING, *encode_text("Hm"), RETURN_ID], "without a final"),
        ([*HEADER, RETURN_ID], "without a final"),
        ([*BODY, CALL_ID], "without a call"),
        (CALL, "does not declare"),
        ([*BODY, END_ID, START_ID, *encode_text("assistant"), *YES], "a message after the final"),
        ([*BODY, END_ID, *header_ids("assistant", "final"), *encode_text("N")], "a message after the final"),
        ([*header_ids("assistant", "notes")[2:], *encode_text("Yes"), RETURN_ID], "unknown channel 'notes'"),
        ([MESSAGE_ID, *encode_text("Yes"), RETURN_ID], "without a channel"),
        (
            [*THOUGHT[:-len(YES) - 2], *header_ids("user"), *encode_text("?"), END_ID, *THOUGHT[-len(YES) - 2 :]],
            "not the assistant",
        ),
    ],
)  # fmt: skip
def test_format_errors_are_found(tokens: list[int], wrong: str) -> None:
    error = read_completion(tokens).error
    assert error is not None and re.search(wrong, error)


def test_calls_to_declared_tools_are_no_error() -> None:
    thought = [*THOUGHT[: -len(YES) - 2], START_ID, *encode_text("assistant")]
    assert read_completion([*thought, *CALL], ["functions.look"]).error is None
    assert "does not declare" in (read_completion([*thought, *CALL], ["functions.other"]).error or "")
    # What the tool says is never the model's to write.
    assert (
        read_completion([*thought, *CALL[:-1], END_ID, *TOLD], ["functions.look"]).error
        == "a message that is not the assistant's"
    )


def test_texts_of_several_messages_are_separated() -> None:
    twice = read_completion([*render_answer("No")[:-1], END_ID, START_ID, *encode_text("assistant"), *YES])
    assert twice.final == "No\n\nYes"
    assert read_completion([*BODY, END_OF_TEXT_ID]).final == "Yes"


def test_generate_on_a_run_and_on_its_adapter_alone(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (run / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    answers = []
    for path in (run, adapter):
        assert main(["generate", str(path), "Hello", "--json", "--max-tokens", "5"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["adapter"]["tokens"] == answers[1]["adapter"]["tokens"]
    assert answers[0]["base"]["tokens"] != answers[0]["adapter"]["tokens"]
    assert answers[1]["prompt_tokens"] != 0


def test_chat_drops_answers_that_cannot_be_parsed(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    lines.write_text("Hello\n/nothing\n/base\nAgain\n/quit\n")
    with lines.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert main(["chat", str(finished[0]), "--max-tokens", "3"]) == 0
    errors = capsys.readouterr().err
    assert "there is no /nothing" in errors and errors.count("this turn is forgotten") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--which", "neither"], "invalid choice"),
    ],
)
def test_options_out_of_range_are_named(
    finished: tuple[Path, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(finished[0]), "Hello", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_longer_than_the_model_is_refused(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(finished[0]), "Hello", "--max-tokens", "200000"]) == 2
    assert "positions" in capsys.readouterr().err
