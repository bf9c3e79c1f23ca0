"""`finetune adapter`: show, import of third-party files, and combining."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from serving_layouts import assert_same_updates, read_peft
from synthetic_adapter import EXPERTS, HIDDEN, SIZES, WIDTH, write_synthetic
from test_export_adapters import export, sites

from finetune.cli.main import main
from finetune.errors import InputError
from finetune.export.combine import combine_adapters
from finetune.export.importing import import_adapter
from finetune.export.options import ExportOptions

FIXTURES = Path(__file__).parents[1] / "fixtures"
SWAPPED = FIXTURES / "peft-0.19.0"  # written by PEFT 0.19.0 itself, its own deltas beside it
FILES = ("adapter_model.safetensors", "adapter_config.json")


def run(*words: object) -> int:
    return main([str(word) for word in words])


def imported(directory: Path, out: Path, **options: object) -> Path:
    import_adapter(directory, out, ExportOptions(**options))  # type: ignore[arg-type]
    return out


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


class TestImport:
    @pytest.mark.parametrize("alone", [None, "gate_up_proj", "down_proj"])
    def test_swapped_files_of_peft_0_19_0_are_corrected(
        self, alone: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        directory = tmp_path / "theirs"
        shutil.copytree(SWAPPED, directory)
        if alone:
            keep_one_projection(directory, alone)
        out = imported(directory, tmp_path / "ours")
        assert "swapped as 0.19.0 did" in capfd.readouterr().err
        found = read_peft(out)
        for name, delta in load_file(FIXTURES / "peft-0.19.0-deltas.safetensors").items():
            site = (0, name.rpartition(".")[2])
            if site[1] not in ("gate_up_proj", "down_proj"):
                wanted = delta.double()
            elif alone in (None, site[1]):
                wanted = delta.double().mT  # transformers' [E, in, out]
            else:
                wanted = torch.zeros_like(delta.double().mT)
            assert (found[site] - wanted).abs().max() < 1e-5, name
        assert imported(out, tmp_path / "again") and same_files(out, tmp_path / "again")

    def test_current_peft_files_are_not_treated_as_swapped(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        adapter = write_synthetic(tmp_path / "theirs", {(0, name): (2, 4.0) for name in SIZES})
        assert_same_updates(read_peft(imported(adapter.directory, tmp_path / "ours")), adapter)
        assert "swapped" not in capfd.readouterr().err

    def test_an_export_of_a_swapped_file_is_refused(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert run("export", SWAPPED, "--to", "peft", "--out", tmp_path / "out") == 3
        assert "the wrong way round, as PEFT 0.19.0" in capfd.readouterr().err

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(sites=sites, rslora=st.booleans())
    def test_round_trips_are_identical(
        self, sites: dict[tuple[int, str], tuple[int, float]], rslora: bool, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """export -> import -> export, for PEFT's layout and for SGLang's."""
        directory = tmp_path_factory.mktemp("trip")
        adapter = write_synthetic(directory / "adapter", sites, rslora=rslora)
        one = export(adapter.directory, "peft", directory / "one")
        assert same_files(one, imported(one, directory / "back"))
        assert same_files(one, export(directory / "back", "peft", directory / "two"))
        qkv = {name for _, name in sites} & {"q_proj", "k_proj", "v_proj"}
        if qkv and (qkv == {"q_proj"} or "q_proj" not in qkv):
            return  # how wide the others are is not known without the base
        there = export(adapter.directory, "sglang", directory / "sglang")
        back = imported(there, directory / "sglang_back")
        assert_same_updates(read_peft(back), adapter)
        assert same_files(there, export(back, "sglang", directory / "sglang_again"))

    def test_gate_and_up_with_an_a_each_and_experts_without_factors(self, tmp_path: Path) -> None:
        """Trained per expert elsewhere: ranks add up, missing factors are zero."""
        g = torch.Generator().manual_seed(0)
        path, tensors = "base_model.model.model.layers.1.mlp.experts", {}
        for expert, names in ((0, ("gate_proj", "up_proj")), (2, ("up_proj", "down_proj"))):
            for name in names:
                inputs, out = (WIDTH, HIDDEN) if name == "down_proj" else (HIDDEN, WIDTH)
                tensors[f"{path}.{expert}.{name}.lora_A.weight"] = torch.randn(2, inputs, generator=g)
                tensors[f"{path}.{expert}.{name}.lora_B.weight"] = torch.randn(out, 2, generator=g)
        directory = tmp_path / "theirs"
        directory.mkdir()
        save_file(tensors, directory / FILES[0])
        named = [f"experts.{key}" for key in ("0.gate_proj", "0.up_proj", "2.up_proj", "2.down_proj")]
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
        (directory / FILES[1]).write_text(json.dumps(config))
        with pytest.raises(InputError, match="lacks the factors of"):  # nothing says that experts are left out
            imported(directory, tmp_path / "unnamed")
        (directory / FILES[1]).write_text(json.dumps(config | {"target_modules": named}))
        found = read_peft(imported(directory, tmp_path / "ours"))

        def update(expert: int, name: str) -> torch.Tensor:
            a, b = (tensors.get(f"{path}.{expert}.{name}.lora_{f}.weight") for f in "AB")
            return torch.zeros(1) if a is None else (b.double() @ a.double()) * 1.5

        for expert in range(EXPERTS):
            assert (found[1, "gate_up_proj"][expert, 0::2] - update(expert, "gate_proj")).abs().max() < 1e-6
            assert (found[1, "gate_up_proj"][expert, 1::2] - update(expert, "up_proj")).abs().max() < 1e-6
            assert (found[1, "down_proj"][expert] - update(expert, "down_proj")).abs().max() < 1e-6

    def test_a_base_given_is_checked_and_recorded(
        self, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        small = write_synthetic(tmp_path / "small", {(0, "q_proj"): (2, 4.0)}).directory
        assert run("adapter", "import", small, "--out", tmp_path / "out", "--base", tiny_base) == 3
        assert "the base has 128 x 64" in capfd.readouterr().err and not (tmp_path / "out").exists()
        path = "base_model.model.model.layers.1.self_attn.q_proj"
        tensors = {f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(128, 2)}
        save_file(tensors, small / FILES[0])
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
        (small / FILES[1]).write_text(json.dumps(config))
        (small / "tokenizer.json").write_text("{}")
        assert run("adapter", "import", small, "--out", tmp_path / "out", "--base", tiny_base) == 0
        assert "left out: tokenizer.json" in capfd.readouterr().err
        facts = json.loads((tmp_path / "out" / "finetune.json").read_text())
        assert len(facts["base_identity"]) == 64
        # One layer of two: PEFT would adapt both if the name did not say which.
        stored = json.loads((tmp_path / "out" / FILES[1]).read_text())
        assert stored["target_modules"] == ["model.layers.1.self_attn.q_proj"]

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ("truncated", "truncated"),
            ("pickle", "a pickle, which can run code"),
            ("dora", "use_dora is True"),
            ("modules", "modules_to_save"),
            ("no config", "adapter_config.json cannot be read"),
            ("no rank", "r is None, not a number"),
            ("other key", "the embedding or the output head"),
            ("not finite", "not finite"),
            ("half", "without its other factor"),
            ("rank", "are no pair of rank"),
            ("nothing", "no adapter directory"),
        ],
    )
    def test_bad_files_are_named(
        self, damage: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        directory = write_synthetic(tmp_path / "bad", {(0, "q_proj"): (2, 4.0), (0, "down_proj"): (2, 4.0)}).directory
        weights, config = (directory / name for name in FILES)
        tensors, settings_ = load_file(weights), json.loads(config.read_text())
        key = next(iter(tensors))
        match damage:
            case "truncated":
                weights.write_bytes(weights.read_bytes()[:-3])
            case "pickle":
                weights.rename(directory / "adapter_model.bin")
            case "dora" | "modules" | "no rank":
                extra = {"dora": {"use_dora": True}, "modules": {"modules_to_save": ["lm_head"]}}
                broken = settings_ | extra.get(damage, {"r": None, "rank_pattern": {}})
                config.write_text(json.dumps(broken))
            case "no config":
                config.unlink()
            case "other key":
                save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, weights)
            case "not finite":
                tensors[key][0, 0] = float("nan")
                save_file(tensors, weights)
            case "half":
                del tensors[key]
                save_file(tensors, weights)
            case "rank":
                save_file(tensors | {key: torch.ones(7, tensors[key].shape[1])}, weights)
            case "nothing":
                shutil.rmtree(directory)
        assert run("adapter", "import", directory, "--out", tmp_path / "out") == 3
        assert words in capfd.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ([] if damage == "nothing" else ["bad"])


def keep_one_projection(directory: Path, name: str) -> None:
    """Files of the same release with one target: `experts.lora_*`, whichever it is."""
    tensors = load_file(directory / FILES[0])
    path = "base_model.model.model.layers.0.mlp.experts"
    other = "base_layer." if name == "gate_up_proj" else ""
    kept = {f"{path}.lora_{f}.weight": tensors[f"{path}.{other}lora_{f}.weight"] for f in "AB"}
    attention = {key: tensor for key, tensor in tensors.items() if "self_attn" in key}
    save_file(attention | kept, directory / FILES[0])
    config = json.loads((directory / FILES[1]).read_text()) | {"target_parameters": [f"mlp.experts.{name}"]}
    (directory / FILES[1]).write_text(json.dumps(config))


class TestShow:
    def test_norms_equal_those_of_the_updates(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        adapter = write_synthetic(tmp_path / "a", {(0, n): (2, 4.0) for n in SIZES} | {(2, "q_proj"): (3, 9.0)})
        assert run("adapter", "show", adapter.directory, "--json") == 0
        shown = json.loads(capfd.readouterr().out)
        assert len(shown["sites"]) == len(adapter.updates)
        for site in shown["sites"]:
            update = adapter.updates[site["layer"], site["name"]]
            assert site["norm"] == pytest.approx(update.norm().item(), rel=1e-5)
            if site["num_experts"]:
                assert site["largest_expert_norm"] == pytest.approx(update.flatten(1).norm(dim=1).max().item())
        total = np.sqrt(sum(update.norm().item() ** 2 for update in adapter.updates.values()))
        assert shown["norm"] == pytest.approx(total, rel=1e-5)
        assert run("adapter", "show", adapter.directory) == 0
        table = capfd.readouterr().out
        assert "q_proj        0,2" in table and "2-3" in table and "0 of 3 experts have none" in table

    def test_untouched_experts_are_counted(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        directory = write_synthetic(tmp_path / "a", {(0, "down_proj"): (2, 4.0)}).directory
        tensors = load_file(directory / FILES[0])
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key][2:4] = 0  # expert 1
        save_file(tensors, directory / FILES[0])
        assert run("adapter", "show", directory) == 0
        assert "1 of 3 experts have none" in capfd.readouterr().out

    def test_a_swapped_file_is_pointed_out(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert run("adapter", "show", SWAPPED) == 0
        assert "wrong way round, as PEFT 0.19.0" in capfd.readouterr().err


class TestMerge:
    A = {(0, "q_proj"): (2, 4.0), (0, "gate_up_proj"): (2, 3.0), (0, "down_proj"): (1, 3.0)}  # noqa: RUF012
    B = {(0, "q_proj"): (3, 1.0), (0, "down_proj"): (2, 3.0), (1, "v_proj"): (2, 2.0)}  # noqa: RUF012

    def parts(self, tmp_path: Path) -> tuple[Path, Path, dict[tuple[int, str], torch.Tensor]]:
        one = write_synthetic(tmp_path / "one", self.A)
        other = write_synthetic(tmp_path / "other", self.B, rslora=True, seed=1)
        wanted: dict[tuple[int, str], torch.Tensor] = {}
        for weight, adapter in ((0.7, one), (-0.3, other)):
            for site, update in adapter.updates.items():
                wanted[site] = wanted.get(site, 0) + weight * update
        return one.directory, other.directory, wanted

    def test_combining_by_concatenated_ranks_is_exact(self, tmp_path: Path) -> None:
        one, other, wanted = self.parts(tmp_path)
        assert run("adapter", "combine", f"{one}:0.7", f"{other}:-0.3", "--out", tmp_path / "sum") == 0
        found = read_peft(tmp_path / "sum")
        assert found.keys() == wanted.keys()
        for site, update in wanted.items():
            assert (found[site] - update).abs().max() < 1e-6 * update.abs().max()

    def test_combining_one_and_three_adapters(self, tmp_path: Path) -> None:
        one, other, _ = self.parts(tmp_path)
        combine_adapters([(one, 2.0)], tmp_path / "double", None)
        combine_adapters([(one, 1.0), (other, 1.0), (other, -1.0)], tmp_path / "three", None)
        plain, double, three = (read_peft(d) for d in (one, tmp_path / "double", tmp_path / "three"))
        for site, update in plain.items():
            if double[site].any():
                assert (double[site] - 2 * update).abs().max() < 1e-5
                assert (three[site] - update).abs().max() < 1e-4

    @pytest.mark.parametrize("rank", [1, 3, 50])
    def test_a_lower_rank_is_optimal_and_its_error_is_printed(
        self, rank: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        one, other, wanted = self.parts(tmp_path)
        words = ["adapter", "combine", f"{one}:0.7", f"{other}:-0.3", "--out", tmp_path / "cut", "--rank", rank]
        assert run(*words) == 0
        found, lost, total = read_peft(tmp_path / "cut"), 0.0, 0.0
        for site, update in wanted.items():
            values = torch.linalg.svdvals(update)
            best = values[..., rank:].norm().item()  # Eckart and Young
            assert (found[site] - update).norm().item() == pytest.approx(best, abs=1e-5)
            lost, total = lost + best**2, total + update.norm().item() ** 2
        assert f"cut off {(lost / total) ** 0.5:.2%} of the update" in capfd.readouterr().err

    @pytest.mark.parametrize("weight", ["x", "nan", "inf", "0", ""])
    def test_invalid_weights_are_refused(self, weight: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        one, other, _ = self.parts(tmp_path)
        assert run("adapter", "combine", f"{one}:{weight}", other, "--out", tmp_path / "sum") == 2
        assert "is not a weight" in capfd.readouterr().err and not (tmp_path / "sum").exists()

    def test_incompatible_adapters_are_refused(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        one, other, _ = self.parts(tmp_path)
        out = tmp_path / "sum"
        a, b = imported(one, tmp_path / "a"), imported(other, tmp_path / "b")
        for number, directory in enumerate((a, b)):
            facts = json.loads((directory / "finetune.json").read_text()) | {"base_identity": str(number) * 64}
            (directory / "finetune.json").write_text(json.dumps(facts))
        assert run("adapter", "combine", a, b, "--out", out) == 3
        assert "different bases" in capfd.readouterr().err
        tensors = load_file(other / FILES[0])
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file(tensors | {key: torch.ones(3, 5)}, other / FILES[0])
        assert run("adapter", "combine", one, other, "--out", out) == 3
        assert "other sizes than the first's" in capfd.readouterr().err
        assert run("adapter", "combine", one, "--rank", 0, "--out", out) == 2
        assert run("adapter", "combine", one, tmp_path / "nothing", "--out", out) == 3
        assert run("adapter", "combine", one, "--out", one) == 2
        assert not out.exists()
