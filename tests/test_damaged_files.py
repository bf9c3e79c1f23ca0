"""Files of the right name and another form: each is refused by file and key, with the true reason, never as a bug."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.attach import attach_adapter
from finetune.adapters.audit import audit_gradients
from finetune.arch import Arch
from finetune.cli.main import _as_known, main
from finetune.config.compose import compose
from finetune.config.expert_selection import ExpertScores, read_expert_scores, write_expert_scores
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig, RouterAdapterConfig
from finetune.data.cache import SplitStats
from finetune.errors import CheckError, ConfigError, FinetuneError, InputError, MachineError
from finetune.export.card import _content_hash
from finetune.files import ResumableDirectory, staged_directory
from finetune.manifest import read_manifest
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.headers import plain_file_name, read_header
from finetune.report.markdown import write_report

SHARD = "model-00002-of-00003.safetensors"  # the tiny base's second shard: all layers but the first


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base; its shards are links, but for the second."""
    copy = tmp_path / "base"
    copy.mkdir()
    for path in tiny_base.iterdir():
        if path.name != "checksums.json":
            linked = path.suffix == ".safetensors" and path.name != SHARD
            (copy / path.name).symlink_to(path) if linked else shutil.copy(path, copy / path.name)
    return copy


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def opened(base: Path) -> None:
    build_base(Checkpoint.open(base), torch.device("cpu"), torch.float32, experts_per_chunk=8)


# ---- config.json


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_theta": 0}, "rope_theta is 0, not a positive number"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, r"rope_scaling\.rope_type is 'linear', not 'default'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "lacks factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": [1]}}, r"rope_scaling\.factor is \[1\]"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": "no"}}, "truncate is 'no'"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"layer_types": [{}, {}]}, "layer_types is"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"swiglu_limit": "x"}, "swiglu_limit is 'x'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"sliding_window": 2**70}, "sliding_window is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; published gpt-oss models have silu"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"initial_context_length": "x"}, "initial_context_length is 'x'"),
        ({"model_type": ["gpt_oss"]}, "another architecture"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_value_of_config_json_has_a_type(tiny_base: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    Arch.from_config(config, "config.json")
    with pytest.raises(InputError, match=message):
        Arch.from_config(config | changes, "config.json")


@pytest.mark.parametrize("changes", [{"pad_token_id": 10**9}, {"use_cache": "x"}, {"dtype": "zzz"}, {"id2label": 3}])
def test_what_transformers_refuses_is_no_bug(base: Path, changes: dict[str, Any]) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=r"config\.json describes a model that transformers cannot build"):
        opened(base)


# ---- weights of a base


def test_a_scale_that_means_nan_is_named(base: Path) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj_scales"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 2, 1] = 255

    rewrite(base / SHARD, damage)
    with pytest.raises(InputError, match=rf"{SHARD}: {name} has 1 scales of 255, .* the first at \[3, 2, 1\]"):
        opened(base)


def test_weights_that_are_not_finite_are_named(base: Path) -> None:
    name = "model.layers.1.self_attn.sinks"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][1] = torch.inf

    rewrite(base / SHARD, damage)
    with pytest.raises(InputError, match=rf"{name} has 1 values that are not finite, the first at \[1\]"):
        opened(base)


@pytest.mark.parametrize("dtype, word", [(torch.float32, "float32"), (torch.float16, "float16")])
def test_another_dtype_is_refused_for_that_reason(base: Path, dtype: torch.dtype, word: str) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}

    rewrite(base / SHARD, cast)
    with pytest.raises(InputError, match=rf"is in {word}: \d+ of its \d+ tensors(.|\n)*fix: cast these tensors"):
        Checkpoint.open(base)


@pytest.mark.parametrize("form", ["gate_up_projs.{}.weight", "{}.gate_proj.weight", "gate_up_proj.{}.weight"])
def test_experts_one_by_one_are_refused_for_that_reason(base: Path, form: str) -> None:
    index = base / "model.safetensors.index.json"
    names = [f"model.layers.1.mlp.experts.{form.format(expert)}" for expert in range(2)]

    def split(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: torch.zeros(2, 2) for name in names}

    rewrite(base / SHARD, split)
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(names, SHARD)
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"every expert in tensors of its own, such as {names[0]}"):
        Checkpoint.open(base)


@pytest.mark.parametrize(
    "header, message",
    [
        ('{"a":%s,"a":%s}', "'a' is in it twice"),
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'dtype' is in it twice"),
        ('{"__metadata__":{"format":3},"a":%s}', "__metadata__ has something else"),
        ('{"__metadata__":[],"a":%s}', "__metadata__ has something else"),
    ],
)
def test_headers_that_readers_would_read_differently(tmp_path: Path, header: str, message: str) -> None:
    header = header.replace("%s", '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}')
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(InputError, match=message):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["a" * 300, "é" * 200, "a\0b", "", "..", "a/b", 3, None])
def test_names_that_no_file_can_have(name: object) -> None:
    with pytest.raises(InputError, match="the index names"):
        plain_file_name(name, Path("the index"))


def test_a_saturated_router_is_named(tiny_base: Path) -> None:
    base = build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, experts_per_chunk=8)
    config = AdapterConfig(
        attention=AttentionAdapterConfig(rank=0),
        experts=ExpertAdapterConfig(rank=0),
        router=RouterAdapterConfig(mode="lora"),
    )
    adapter = attach_adapter(base, config, seed=0)
    with pytest.raises(CheckError, match=r"routers' factors(.|\n)*saturated(.|\n)*adapter\.router\.mode=frozen"):
        audit_gradients(base.model, adapter, "b")


# ---- files of a run


MANIFEST = {"status": "stopped", "base": {"name": "b", "identity": "0" * 64}, "minutes": 1.5, "warnings": []}


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"status": "dancing"}, "status is 'dancing'"),
        ({"base": 3}, "base is 3"),
        ({"base": None}, "base is None"),
        ({"base": {"revision": [1]}}, r"base\.revision is \[1\]"),
        ({"data": {"train": {"rows": "many"}}}, r"data\.train\.rows is 'many'"),
        ({"warnings": "x"}, "warnings is 'x'"),
        ({"minutes": "x"}, "minutes is 'x'"),
        ({"config": []}, r"config is \[\]"),
        ({"overrides": [1]}, r"overrides\.0 is 1"),
    ],
)
def test_a_manifest_of_another_form_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(MANIFEST))
    assert read_manifest(tmp_path) == MANIFEST
    path.write_text(json.dumps(MANIFEST | changes))
    with pytest.raises(InputError, match=rf"manifest\.json: {key}"):
        read_manifest(tmp_path)
    assert "# Run " in write_report(tmp_path).read_text()  # a report leaves out what it cannot show


def test_counts_of_the_token_cache_have_types() -> None:
    for key, value in (("bad_records", [3]), ("answers", []), ("num_tokens", "x"), ("control_text", {"a": 1})):
        with pytest.raises(InputError, match=f"{key}"):
            SplitStats.from_json({key: value})


def test_scores_of_experts_have_types(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    scores = ExpertScores("b", "0", 1, 1, [[1.0]], [[1.0]], "gate", "top_p=0.2", {0: (0,)}, {0: (4,)})
    write_expert_scores(path, scores)
    assert read_expert_scores(path) == scores
    good = json.loads(path.read_text())
    for changes in ({"gate": 3}, {"selected": {"x": [1]}}, {"selected": {"0": 3}}, {"ranks": {"0": [None]}}, {"by": 1}):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(InputError, match=rf"experts\.json: {next(iter(changes))}"):
            read_expert_scores(path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read_expert_scores(path)


@pytest.mark.parametrize(
    "damage", ["[]", '{"key": "k", "shards": [1]}', '{"key": "k", "shards": {"a": 3}}', "digit", "["]
)
def test_a_damaged_list_of_finished_files_starts_the_export_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ResumableDirectory(tmp_path / "out", "k")
    first.unfinished("a").write_text("x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    first.finish("a", {"sha256": digest, "tallies": {"n": 1.5}})
    assert ResumableDirectory(tmp_path / "out", "k").files
    progress = first.path / "progress.json"
    progress.write_text(progress.read_text().replace("1.5", "2.5") if damage == "digit" else damage)
    assert not ResumableDirectory(tmp_path / "out", "k").files
    assert "cannot be read, or was changed: starting again" in capsys.readouterr().err


def test_a_data_file_that_was_cut_after_the_training_does_not_end_the_card(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00cut")
    assert len(_content_hash(str(path))) == 64
    path.unlink()
    assert "not available" in _content_hash(str(path))


# ---- values and names


def test_a_learning_rate_that_overflows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.learning_rate"):
        compose("quickstart", ["trainer.learning_rate=1e300"])


def test_names_that_are_not_utf8_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["report", "a\udcff"], ["train", "quickstart", "name=\udcfe"], ["export", "x", "--out", "\udcff"]):
        assert main(words) == InputError.exit_code
        told = capsys.readouterr().err
        assert "is not UTF-8" in told and "rename" in told
    (tmp_path / "d\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "d\udcff")
    assert main(["recipes"]) == MachineError.exit_code
    assert "the working directory" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="choose a shorter name"), staged_directory(tmp_path / ("a" * 250)):
        pass
    with pytest.raises(MachineError, match="choose a shorter name"):
        ResumableDirectory(tmp_path / ("a" * 250), "k")
    known = _as_known(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), "export")
    assert known is not None and known.fix is not None and known.fix.startswith("choose a shorter name")


@pytest.mark.parametrize(
    "command, word", [("train", "data.max_length"), ("export", "--no-verify"), ("chat", "a machine")]
)
def test_memory_that_runs_out_is_answered_with_what_the_command_can_change(command: str, word: str) -> None:
    known = _as_known(MemoryError(), command)
    assert isinstance(known, FinetuneError) and known.exit_code == 4 and known.fix is not None
    assert word in known.fix and (command == "train") == ("micro_batch_size" in known.fix)
