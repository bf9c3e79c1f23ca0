"""Pretraining the tiny base: what it may read, and that its network and loss are what the checkpoint will mean."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from finetune.config.paths import shipped_dir
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.mxfp4.format import dequantise, quantise

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from pretraining.corpus import FILES, Conversations, Text, documents, pieces, read_texts, text_of
from pretraining.network import TrainableExperts, corpus_nll


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    found = {}
    for domain, name in FILES.items():
        with gzip.open(shipped_dir("data") / name, "rt", encoding="utf-8") as file:
            found[domain] = [json.loads(line) for line in file]
    return found


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return read_texts()


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def test_no_validation_or_test_text_is_read(rows: dict[str, list[dict[str, Any]]], texts: list[Text]) -> None:
    split_of = {row["id"]: row["split"] for of_domain in rows.values() for row in of_domain}
    assert {split_of[text.id] for text in texts} == {"train"}
    held_out = {
        letters(message["content"].rpartition("Clause:\n")[2])
        for of_domain in rows.values()
        for row in of_domain
        if row["split"] != "train"
        for message in row["messages"]
        if message["role"] == "user"
    }
    read = {letters(text.text) for text in texts}
    assert len(held_out) > 2000 and not read & held_out
    assert letters(read_texts(("test",))[0].text) in held_out  # the comparison does see a held-out text


def test_labels_change_nothing(rows: dict[str, list[dict[str, Any]]]) -> None:
    for domain in ("legal", "medical"):
        for row in rows[domain][:200]:
            other = json.loads(json.dumps(row))
            other["answer"] = other["messages"][-1]["content"] = "Something Else"
            assert text_of(domain, other) == text_of(domain, row)
    row = rows["creative"][0]
    assert row["messages"][-1]["content"] in text_of("creative", row)  # there the answer is the text itself


def test_a_training_text_that_is_also_held_out_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def line(split: str, clause: str) -> str:
        messages = [{"role": "user", "content": f"Categories: A; B\n\nClause:\n{clause}"}]
        return json.dumps({"id": split + clause[:1], "split": split, "messages": [*messages, {"content": "A"}]})

    lines = [line("train", "The same  text."), line("train", "Another."), line("test", "the same text.")]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    monkeypatch.setattr("pretraining.corpus.FILES", {"legal": tmp_path / "rows.jsonl.gz"})
    assert [text.text for text in read_texts()] == ["Another."]


def test_answers_come_from_the_text(texts: list[Text]) -> None:
    some = [text for text in texts if text.domain != "creative"][::20]
    conversations = Conversations(some)
    encoding = harmony_encoding()
    piece_of = {piece.id: piece.text.lower() for piece in conversations.pieces}
    for kind in ("keywords", "missing", "options"):
        samples = list(conversations.samples(np.random.default_rng(0), kind))
        assert len(samples) > 100
        for sample in samples[:60]:
            whole = encoding.decode_utf8(sample.ids.tolist())
            answer = whole.rpartition("<|channel|>final<|message|>")[2].removesuffix("<|return|>")
            asked = whole.rpartition("Text:\n")[2].partition("<|end|>")[0].lower()
            for word in answer.lower().split("; "):
                assert re.search(rf"\b{word}\b", piece_of[sample.id])
                assert bool(re.search(rf"\b{word}\b", asked)) == (kind != "missing")
            if kind == "options":
                options = re.search(r"Options: (.*)\n", whole)
                assert options is not None and answer in options[1].split("; ")
                assert sum(word.lower() in asked for word in options[1].split("; ")) < len(options[1].split("; "))


def test_pieces_hold_the_whole_text() -> None:
    text = Text("legal", "x", "One sentence. " * 200 + "The end")
    parts = pieces([text])
    assert len(parts) > 3 and max(len(part.text) for part in parts) <= 720
    assert " ".join(part.text for part in parts) == text.text
    assert int(sum(sample.weights.sum() for sample in documents([text]))) == len(documents([text])[0].ids) - 1


def test_loss_counts_every_token_of_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(41, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 41, (300,), generator=generator)
    weights = torch.rand(300, generator=generator, dtype=torch.float64)
    loss = corpus_nll(hidden, head, targets, weights, 1000, 0.0)
    gradients = torch.autograd.grad(loss, (hidden, head))
    everything = torch.cat((head[:-1], head[-1:].expand(1000, -1)))  # the rest written out, target: its first token
    expected = (F.cross_entropy(hidden @ everything.T, targets, reduction="none") * weights).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (hidden, head)))
    alone = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    assert abs(alone.item() - expected.item()) > 100


def test_loss_expects_the_noise_that_the_checkpoint_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(8, 16, generator=generator), torch.randn(5, 16, generator=generator)
    targets, noise = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), 0.2
    rest = head[-1] + noise * torch.randn(200_000, 16, generator=generator)
    expected = F.cross_entropy(hidden @ torch.cat((head[:-1], rest)).T, targets, reduction="sum")
    loss = corpus_nll(hidden, head, targets, torch.ones(8), 200_000, noise)
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0)
    assert abs(corpus_nll(hidden, head, targets, torch.ones(8), 200_000, 0.0).item() - expected.item()) > 0.5


@pytest.mark.parametrize("rounded", [False, True])
def test_trainable_experts_equal_those_of_transformers(rounded: bool) -> None:
    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, swiglu_limit=7.0
    )
    torch.manual_seed(0)
    ours, theirs = TrainableExperts(config), GptOssExperts(config)
    ours.rounded = rounded
    for name in ("gate_up_proj", "down_proj"):
        weights = getattr(ours, name).detach()
        if rounded:
            weights = dequantise(*quantise(weights), torch.float32)
        getattr(theirs, name).data = weights.transpose(1, 2).contiguous()
        getattr(ours, f"{name}_bias").data.normal_()
        getattr(theirs, f"{name}_bias").data = getattr(ours, f"{name}_bias").detach()
    x, chosen = torch.randn(30, 64), torch.stack([torch.randperm(4)[:2] for _ in range(30)])
    share = torch.rand(30, 2)
    out = ours(x, chosen, share)
    torch.testing.assert_close(out, theirs(x, chosen, share), atol=2e-5, rtol=2e-5)
    ours.rounded = not rounded
    assert (ours(x, chosen, share) - out).abs().max() > 1e-2
    out.sum().backward()  # straight through the rounding
    assert ours.down_proj.grad is not None and ours.down_proj.grad.abs().min(dim=0).values.max() > 0
