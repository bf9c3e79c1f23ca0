"""Expert use against a manual count, drift, its limit, and the files of a run."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from router_runs import SMALL, Run, new_base, samples, shake
from small_run import Train, manifest_of, metrics_of

from finetune.adapters.attach import attach_adapter
from finetune.config.schema import RouterAdapterConfig
from finetune.data.batches import collate, padding_batch
from finetune.data.harmony.encode import HEADER, Channel
from finetune.data.harmony.render import Example
from finetune.evaluate.usage import group_names, token_groups, usage_figures, usage_table
from finetune.model.build import Base
from finetune.model.forward import logits, record_router
from finetune.model.usage import changed_share, count_usage
from finetune.report.charts import heat_map


def channelled(count: int = 5) -> list[Example]:
    rng = np.random.default_rng(1)
    return [
        replace(s, channels=(rng.integers(0, 5, len(s.ids)) + HEADER * rng.integers(0, 2, len(s.ids))).astype(np.int8))
        for s in samples(count)
    ]


def count(base: Base, data: list[Example], source: list[int]) -> Any:
    return count_usage(
        base, data, 256, lambda n: token_groups(data[n], source[n]), 2 * len(Channel), task="test"
    )  # fmt: skip


def test_use_of_experts_is_a_count_by_hand(tiny_base: Path) -> None:
    """By source, channel, layer and expert; each example alone in the model, token by token."""
    base, data, source = new_base(tiny_base), channelled(), [0, 0, 1, 1, 1]
    table = usage_table("before", count(base, data, source), group_names(["one", "two"])).to_pylist()
    chosen: dict[tuple[Any, ...], int] = {}
    gates: dict[tuple[Any, ...], float] = {}
    tokens: dict[tuple[str, str], int] = {}
    for number, sample in enumerate(data):
        with torch.no_grad(), record_router(base.model) as tape:
            logits(base.model, torch.from_numpy(sample.ids).long())
        for place, code in enumerate(sample.channels.tolist()):
            group = (("one", "two")[source[number]], Channel(code % HEADER).name.lower())
            tokens[group] = tokens.get(group, 0) + 1
            for layer, routing in enumerate(tape.layers):
                x = routing.logits[place].double().numpy()
                best = np.argsort(-x)[:4]
                for expert, weight in zip(best.tolist(), np.exp(x[best]) / np.exp(x[best]).sum(), strict=True):
                    key = (*group, layer, expert)
                    chosen[key], gates[key] = chosen.get(key, 0) + 1, gates.get(key, 0.0) + weight
    assert len(table) == len(tokens) * 2 * 8 and len(tokens) == 10
    for row in table:
        key = (row["source"], row["channel"], row["layer"], row["expert"])
        assert row["tokens"] == tokens[key[:2]] and row["chosen"] == chosen.get(key, 0)
        assert row["gate"] == pytest.approx(gates.get(key, 0.0), abs=1e-4)
        assert row["token_share"] == row["chosen"] / row["tokens"]
    first = [row for row in table if (row["source"], row["channel"], row["layer"]) == ("one", "final", 0)]
    assert sum(row["token_share"] for row in first) == pytest.approx(4)
    assert sum(row["gate_share"] for row in first) == pytest.approx(1, abs=1e-5)


def test_drift_is_the_share_of_tokens_whose_set_changed(tiny_base: Path) -> None:
    base, data, source = new_base(tiny_base), channelled(), [0] * 5
    adapter = attach_adapter(base, replace(SMALL, router=RouterAdapterConfig(mode="full")), seed=0)
    before = count(base, data, source)
    shake(adapter.parameters(), 0.1)
    after = count(base, data, source)
    wanted = [
        np.mean([set(one) != set(other) for one, other in zip(a.tolist(), b.tolist(), strict=True)])
        for a, b in zip(before.choices, after.choices, strict=True)
    ]
    assert changed_share(before, after) == pytest.approx(wanted) and 0.05 < min(wanted) < 1
    with adapter.disabled():
        assert changed_share(before, count(base, data, source)) == [0, 0]


def test_figures_of_a_layer() -> None:
    figures = usage_figures(np.array([[5.0, 5, 5, 5], [20, 0, 0, 0], [16, 2, 2, 0]]))
    assert figures.entropy == pytest.approx([1, 0, -(0.8 * np.log(0.8) + 0.2 * np.log(0.1)) / np.log(4)])
    assert figures.variation == pytest.approx([0, np.sqrt(3), np.std([16, 2, 2, 0]) / 5])
    assert figures.dead == [[], [1, 2, 3], [3]] and figures.hot == [[], [0], [0]]


def test_training_tokens_are_counted_once_and_padding_never(tiny_base: Path) -> None:
    data = samples(4)
    run = Run(tiny_base, checkpointed=True, router_balance_scope="step", router_balance_coefficient=0.01)
    run([collate([data[:2], data[2:]]), padding_batch()])
    usage = run.step.usage
    total = sum(len(sample.ids) for sample in data)
    assert usage.tokens.tolist() == [total]
    assert usage.chosen.sum((1, 2)).tolist() == [4 * total] * 2
    assert usage.gates.sum((1, 2)).tolist() == pytest.approx([total] * 2, rel=1e-5)


def test_a_run_writes_usage_table_figures_and_report_section(train: Train) -> None:
    code, run = train("evaluate.routing_examples=6", "trainer.max_steps=3", "adapter.router.mode=lora")
    assert code == 0
    table = pq.read_table(run / "expert_usage.parquet")
    rows = table.to_pylist()
    assert {row["when"] for row in rows} == {"before", "after", "training"}
    assert {row["source"] for row in rows} == {"mine", "all"}
    assert {"context", "final"} <= {row["channel"] for row in rows}
    trained = sum(row["chosen"] for row in rows if row["when"] == "training" and row["layer"] == 0)
    lines = metrics_of(run)
    assert trained == 4 * sum(line["tokens"] for line in lines if line["kind"] == "step")
    looks = [line for line in lines if line["kind"] == "routing"]
    assert [line["step"] for line in looks] == [3] and len(looks[0]["drift"]) == 2
    facts = manifest_of(run)["routing"]
    assert facts["drift"] == looks[-1]["drift"] and max(facts["drift"]) > 0
    report = (run / "report.md").read_text()
    assert "## Experts" in report and "tokens with other experts" in report
    for figure in ("experts_before", "experts_after", "experts_change", "experts_channel_0"):
        assert f"(figures/{figure}.svg)" in report
        root = ElementTree.parse(run / "figures" / f"{figure}.svg").getroot()
        cells = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("width") == "9"]
        assert len(cells) == 2 * 8


def test_excessive_routing_drift_exits_with_6(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train(
        "evaluate.routing_examples=4", "evaluate.max_routing_drift=0.01", "trainer.max_steps=4",
        "trainer.learning_rate=0.1", "adapter.router.mode=full",
    )  # fmt: skip
    assert code == 6
    error = capsys.readouterr().err
    assert "routing drifted too far after step 3" in error and "router_balance_target=base" in error
    assert not (run / "adapter").exists() and manifest_of(run)["status"] == "stopped"


def test_heat_maps_escape_and_colour() -> None:
    drawn = heat_map([[0.0, 1.5, 9.0], [-3.0, float("nan"), 3.0]], title='a <script> & "b"', rows="r", columns="c",
                     most=3.0, diverging=True)  # fmt: skip
    root = ElementTree.fromstring(drawn)
    assert root.get("aria-label") == 'a <script> & "b"' and "<script>" not in drawn
    cells = [e.get("fill") for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("width") == "9"]
    assert (
        cells[0] == "#ffffff" and cells[2] == cells[5] == "#08306b" and cells[3] == "#a50f15" and cells[4] == "#999999"
    )


def test_a_tracker_gets_the_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate.tracking import WandBTracker

    from finetune.config.schema import LoggingConfig
    from finetune.train.metrics import Tracker

    sent: dict[str, Any] = {}

    class Stub(WandBTracker):  # type: ignore[misc]
        def start(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            sent["wandb"] = (values, step)

    monkeypatch.setattr("finetune.train.metrics.make_tracker", lambda config, directory: Stub("project"))
    main_process = SimpleNamespace(is_main_process=True)
    tracker = Tracker(main_process, LoggingConfig(tracker="wandb"), {}, tmp_path)  # type: ignore[arg-type]
    tracker.log_image("map", np.zeros((2, 2), dtype=np.uint8), 5)
    assert sent["wandb"][1] == 5 and sent["wandb"][0]["map"][0].shape == (2, 2)
