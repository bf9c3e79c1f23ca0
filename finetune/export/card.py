"""The model card of an export: origin, data, recipe, figures, limits of use; records only if allowed.

Attributions are handed on: a base lists its own in its README.md under `## Attribution`, and our cards have that
section too, so that a model trained on an export keeps the attributions of the export.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import log
from finetune.adapters.store import BaseRecord
from finetune.config.expert_selection import highest_rank
from finetune.config.paths import HUB_PREFIX, resolve_data_path, shipped_dir
from finetune.config.schema import ExpertAdapterConfig, RunConfig
from finetune.config.validate import load_run_config
from finetune.data.dataset import load_split
from finetune.errors import FinetuneError
from finetune.export.record import AdapterCheck, ExportRecord, MergeCheck, Skipped
from finetune.export.survival.effect import Effect
from finetune.files import write_text
from finetune.log import printable
from finetune.manifest import read_manifest
from finetune.markdown import code, escaped
from finetune.model.tiny import ATTRIBUTION
from finetune.results import Evaluation, read_evaluation

NUM_EXAMPLES = 3
UNKNOWN_LICENCE = "licence not recorded; establish it before you publish this model"
_SHIPPED = "shipped://"
_SERVING = {
    "bf16": "vllm serve .\npython -m sglang.launch_server --model-path .",
    "mxfp4": "vllm serve .\nmlx_lm.server --model .",
    "gguf": "llama-server -m {file} --jinja",
}
_KINDS = {
    "bf16": "a merged checkpoint in bfloat16",
    "mxfp4": "a merged checkpoint in gpt-oss's native MXFP4 layout",
    "gguf": "a merged GGUF file",
    "peft": "a LoRA adapter for PEFT and vLLM",
    "sglang": "a LoRA adapter for SGLang",
    "gguf-lora": "a LoRA adapter for llama.cpp",
    "mlx": "a LoRA adapter for mlx-lm",
}
_LIBRARIES = {"gguf": "gguf", "peft": "peft", "sglang": "peft", "gguf-lora": "gguf", "mlx": "mlx"}
_LIMITS = """## Limits of use

- It is a language model: it can be wrong, invent sources, and repeat errors and biases of the base and of the data.
  The base's licence and usage policy go with it."""
_LIMITS_OF_DOMAIN = {
    "legal": "- **Legal texts**: what it writes is no legal advice. Names of clauses and readings of contracts must be "
    "checked by a\n  person qualified in the jurisdiction concerned; the law it saw may be outdated or another "
    "country's.",
    "medical": "- **Medical texts**: what it writes is no medical advice, and it is no medical device. It must not "
    "decide on diagnosis,\n  treatment or triage, and must not be shown to patients without review by a qualified "
    "person.",
    "creative": "- **Creative texts**: it may reproduce passages of the texts it was trained on. Check what is "
    "published for\n  wording that is another's.",
}
_LIMITS_OF_FIGURES = (
    "- The figures above hold for the test examples they were measured on. Measure on your own before you rely on it."
)
_PUBLISHED = {"gpt-oss-20b": "openai/gpt-oss-20b", "gpt-oss-120b": "openai/gpt-oss-120b"}
_PUBLISHED_LICENCE = "apache-2.0"


@dataclass(frozen=True)
class _Manifest:
    """The parts of a run's manifest.json that a card shows; empty without a run."""

    recipe: str | None = None
    total_steps: int | None = None
    data: tuple[str, ...] = ()  # one line per split


def write_card(path: Path, record: ExportRecord, run: Path | None, commands: Sequence[str] = ()) -> None:
    """Write the card.

    Args:
        path: of the README.md.
        record: of the export.
        run: the run directory, for recipe, data and evaluation; None: without those parts.
        commands: of an adapter: the command that serves it, and notes on it.
    """
    manifest, evaluation = _read_manifest(run), _results(run)
    config = _config(run)
    when = "before merging" if record.is_merged else "as it was trained"
    sections = [
        _front(record, config),
        f"# {_title(record, manifest)}\n\n{_origin(record)}, made by {record.written_by} on {record.written[:10]}. "
        "`export.json` has every check and file hash.",
        _survival(record),
        _data(config, manifest),
        attribution_section(record.base, [source.path for source in config.data.train.values()] if config else None),
        _recipe(config, manifest),
        examples_section(config),
        _evaluation(evaluation, when),
        _checks(record),
        _limits(config),
        _serving(record, commands),
    ]
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")


def _front(record: ExportRecord, config: RunConfig | None) -> str:
    """Metadata as the hub reads it; a JSON string is a YAML one, so that no name adds keys."""
    lines = ["---", f"library_name: {_LIBRARIES.get(record.target, 'transformers')}"]
    name = _model_name(record.base)
    if name:
        lines.append(f"base_model: {json.dumps(name)}")
        lines.append(f"base_model_relation: {'finetune' if record.is_merged else 'adapter'}")
    if name in _PUBLISHED.values():
        lines.append(f"license: {_PUBLISHED_LICENCE}")
    if hub := sorted(_hub_data(config)):
        lines.append(f"datasets: {json.dumps(hub)}")
    return "\n".join([*lines, f"tags: [gpt-oss, lora{', merged' if record.is_merged else ''}]", "---"])


def _model_name(base: BaseRecord) -> str | None:
    """The base's hub name; of a directory its last part, which is a published model's where it is called like one."""
    if not base.name or base.revision:
        return base.name
    name = Path(base.name).name
    return _PUBLISHED.get(name, name)


def _hub_data(config: RunConfig | None) -> set[str]:
    paths = _training_paths(config)
    return {path.removeprefix(HUB_PREFIX).partition("?")[0] for path in paths if path.startswith(HUB_PREFIX)}


def _training_paths(config: RunConfig | None) -> list[str]:
    return [source.path for source in config.data.train.values()] if config else []


def _limits(config: RunConfig | None) -> str:
    """Limits of use, with those of the domains that the training data is from, as far as its paths tell."""
    paths = " ".join(path.lower() for path in _training_paths(config))
    domains = [text for domain, text in _LIMITS_OF_DOMAIN.items() if domain in paths]
    return "\n".join([_LIMITS, *domains, _LIMITS_OF_FIGURES])


def _origin(record: ExportRecord) -> str:
    what = f"This is {_KINDS[record.target]}"
    if record.is_merged:
        return f"{what}: {_base(record.base)} with a LoRA adapter folded in"
    return f"{what}, to be put over its base {_base(record.base)}, whose weights are not here"


def _serving(record: ExportRecord, commands: Sequence[str]) -> str:
    command, *notes = commands or [_SERVING[record.target].format(file=record.file or "model.gguf")]
    name = record.base.name
    if name and (Path(name).is_absolute() or Path(name).exists()):
        command = command.replace(name, Path(name).name)  # its place on this machine is nobody's business
    command = re.sub(r"(?<![\w.:/])/[^\s'\"]*/(?=[^\s'\"/])", "", command)  # nor is any other absolute path
    return "\n\n".join([f"## Serving\n\n```\n{command}\n```", *notes])


def _title(record: ExportRecord, manifest: _Manifest) -> str:
    base = escaped(Path(record.base.name or "gpt-oss").name)
    return f"{base}, fine-tuned with {escaped(manifest.recipe)}" if manifest.recipe else f"{base}, fine-tuned"


def _base(base: BaseRecord) -> str:
    if not base.name:
        return "(not named by the adapter)"
    name = base.name if base.revision else Path(base.name).name
    revision = f" at {code(base.revision)}" if base.revision else ""
    identity = f"identity {code(base.identity)}" if base.identity else "identity not recorded"
    return f"{code(name)}{revision} ({identity})"


def _survival(record: ExportRecord) -> str:
    if record.survival is None:
        return ""
    overall, effect = record.survival.overall, record.survival.end_to_end
    measured = ""
    if isinstance(effect, Effect):
        written = effect.variants[record.survival.rounding]
        if written.gain_kept is not None:
            measured = (
                f" On {effect.rows} held-out examples it keeps {written.gain_kept:.1%} of the adapter's gain, "
                f"and {written.kl_removed:.1%} of the distance (KL) between base and adapter is gone."
            )
    if overall.outputs is not None:
        return (
            "**The experts were rounded back to 4 bits with compensation: "
            f"{overall.outputs.projection:.1%} of the fine-tune's update survives in their outputs** on its "
            f"own training examples (attention is exact).{measured}"
        )
    return (
        "**The experts were rounded back to 4 bits, and "
        f"{overall.survival:.1%} of the fine-tune's update of them is left** "
        "(projection; attention is exact). Prefer the bfloat16 merge or the adapter where that matters." + measured
    )


# ---- data and attributions


def _data(config: RunConfig | None, manifest: _Manifest) -> str:
    if config is None:
        return "## Data\n\nNot recorded: the adapter was exported without its run."
    lines = []
    sources = {
        source.path for split in ("train", "validation", "test") for source in getattr(config.data, split).values()
    }
    for path in sorted(sources):
        licence = _licence_entry(path, "Licence") or UNKNOWN_LICENCE
        lines.append(f"- {code(_shown_name(path))}, sha256 of its content `{_content_hash(path)}`: {licence}")
    return "## Data\n\n" + "\n".join([*lines, *manifest.data]) + "\n\nNo records are shown here."


def _content_hash(path: str) -> str:
    """SHA-256 of a data file, decompressed, as data/LICENSES.md lists it."""
    try:
        content = resolve_data_path(path).read_bytes()
    except (OSError, FinetuneError):
        return "not available: the file is not here any more"
    if content[:2] == b"\x1f\x8b":
        with contextlib.suppress(OSError, EOFError, zlib.error):  # cut since the training: then it is no known file
            content = gzip.decompress(content)
    return hashlib.sha256(content).hexdigest()


def attribution_section(base: BaseRecord, sources: Iterable[str] | None) -> str:
    """The attributions of the base's own training and of the recipe's data.

    Args:
        base: of the export.
        sources: paths of the data that the adapter was trained on, as the recipe has them; None: not known.
    """
    parts = [f"{ATTRIBUTION}\n\n**The base**:\n\n{base_attributions(base)}"]
    if sources is not None:
        lines = [
            f"- {code(_shown_name(path))}: {_source_attribution(path) or UNKNOWN_LICENCE}" for path in sorted(sources)
        ]
        parts.append("**What the adapter was trained on**:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def base_attributions(base: BaseRecord) -> str:
    """The text under `## Attribution` in a base's README.md; without one, that the terms of its maker apply."""
    if not base.name:
        return "Not named by the adapter; its terms apply."
    if base.revision:  # a hub name
        return f"{code(base.name)}; its licence and usage policy go with this model."
    path = Path(base.name).expanduser()
    try:
        text = (path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return f"{code(path.name)}. Its README.md was not there: carry its terms and attributions on yourself."
    section = text.partition(f"\n{ATTRIBUTION}\n")[2].partition("\n## ")[0].strip()
    return section or f"{code(path.name)}. Its README.md names no attributions; its licence goes with this model."


def _source_attribution(path: str) -> str | None:
    """Source, licence and changes of a shipped file as data/LICENSES.md has them; None if it is not shipped."""
    entries = [_licence_entry(path, key) for key in ("Source", "Licence", "Changed")]
    return " ".join(entry for entry in entries if entry) or None


def _shown_name(path: str) -> str:
    """A data path without its place on this machine."""
    return path.removeprefix(_SHIPPED) if path.startswith(_SHIPPED) else Path(path).name


def _licence_entry(path: str, key: str) -> str | None:
    listing = shipped_dir("data") / "LICENSES.md"
    if not path.startswith(_SHIPPED) or not listing.is_file():
        return None
    name = re.escape(path.removeprefix(_SHIPPED))
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", listing.read_text(encoding="utf-8"), re.M | re.S)
    entry = section and re.search(rf"- \*\*{key}\*\*: (.*?)(?=\n- \*\*|\Z)", section[1], re.S)
    return " ".join(entry[1].split()) if entry else None


def examples_section(config: RunConfig | None) -> str:
    """The first test (or training) conversations; "" unless the recipe allows it (`export.share_examples`)."""
    if config is None or not config.export.share_examples:
        return ""
    try:
        split = load_split(config.data, "test" if config.data.test else "train")
    except FinetuneError as error:
        return f"## Examples\n\nThe data could not be read when this card was written: {escaped(error.what)}."
    parts = []
    for record in split.records[:NUM_EXAMPLES]:
        texts: list[tuple[str, str]] = [(message.role, message.content) for message in record.messages]
        if record.conversation.text is not None:
            texts.append(("text", record.conversation.text))
        parts.append("\n".join(f"{role}: {text}" for role, text in texts))
    # Indented text is shown as it is: nothing in the data becomes markup.
    blocks = ["\n".join(f"    {printable(line)}" for line in part.splitlines()) for part in parts]
    return f"## Examples\n\nThe first records of the {split.name} data, unchanged.\n\n" + "\n\n---\n\n".join(blocks)


# ---- recipe, evaluation, checks


def _recipe(config: RunConfig | None, manifest: _Manifest) -> str:
    if config is None:
        return ""
    adapter, trainer = config.adapter, config.trainer
    lines = [
        f"- attention rank {adapter.attention.rank}, alpha {adapter.attention.alpha:g}; "
        f"experts rank {_expert_rank(adapter.experts)}, alpha {adapter.experts.alpha:g}",
        f"- {manifest.total_steps or '?'} steps, {trainer.epochs:g} epochs, learning rate "
        f"{trainer.peak_learning_rate:g}, seed {config.seed}, sequences of {config.data.max_length:,} tokens",
    ]
    return f"## Recipe\n\n{code(manifest.recipe or '?')}\n\n" + "\n".join(lines)


def _expert_rank(experts: ExpertAdapterConfig) -> str:
    if experts.rank_by == "uniform":
        return str(experts.rank)
    return f"{experts.rank} on average, distributed by {Path(experts.rank_by).name} (at most {highest_rank(experts)})"


def _evaluation(evaluation: Evaluation | None, when: str) -> str:
    if evaluation is None or evaluation.test is None or not evaluation.has("adapter"):
        return "## Evaluation\n\nNone recorded."
    titles = {
        "test loss": "test loss, nats per trained token",
        "accuracy": "label accuracy",
        "pair accuracy": "pair accuracy",
    }
    rows = ["| | before | after |", "|---|---|---|"]
    for title, figures in evaluation.headlines():
        if figures.base and figures.adapter:
            rows.append(f"| {titles[title]} | {figures.base.headline()} | {figures.adapter.headline()} |")
    size = f"{evaluation.test.rows} test examples, {evaluation.confidence:.0%} intervals"
    return "## Evaluation\n\n" + "\n".join(rows) + f"\n\n{size}, measured with the adapter {when}."


def _checks(record: ExportRecord) -> str:
    found = record.verification
    if isinstance(found, AdapterCheck):
        return (
            "## Checks\n\nThe files were read back in a fresh process, by the layout that the target publishes: all "
            f"{found.sites:,} sites (projections of layers and experts) act on random vectors as the trained adapter's"
            f", to a relative difference of {found.max_relative_difference:.1e}. No server was run for this."
        )
    if not isinstance(found, MergeCheck):
        return f"## Checks\n\nNot verified ({escaped(found.skipped)})." if isinstance(found, Skipped) else ""
    lines = [
        f"- every weight was compared with base + update by third-party code in a fresh process: "
        f"{found.weights.tensors_changed} changed, all others as in the base"
    ]
    logits = found.logits
    if isinstance(logits, Skipped):
        lines.append(f"- logits were not compared: {escaped(logits.skipped)}")
    else:
        adapted = logits.adapted
        lines.append(
            f"- logits by transformers against base + adapter on {logits.samples} samples: mean KL "
            f"{adapted.mean_kl:.2e}, same likeliest token at {adapted.argmax_agreement:.1%} of positions"
        )
    return "## Checks\n\n" + "\n".join(lines)


def _config(run: Path | None) -> RunConfig | None:
    if run is None:
        return None
    try:
        return load_run_config(run / "config.yaml")
    except FinetuneError:
        return None


def _results(run: Path | None) -> Evaluation | None:
    """The run's evaluation.json; None if it is missing, or (with a warning) damaged."""
    try:
        return read_evaluation(run / "evaluation.json") if run else None
    except FinetuneError as error:
        log.warning(f"the model card says nothing of the evaluation: {error.what}")
        return None


def _read_manifest(run: Path | None) -> _Manifest:
    """From the run's manifest.json; empty if it is missing, or (with a warning) damaged: a card has less in it then."""
    try:
        content = read_manifest(run) if run else {}
        data = tuple(
            f"- {split}: {figures['rows']:,} examples, {figures['trained_tokens']:,} of {figures['tokens']:,} tokens "
            f"trained or scored, fingerprint `{figures['fingerprint']}`"
            for split, figures in content.get("data", {}).items()
        )
        return _Manifest(content.get("recipe"), content.get("total_steps"), data)
    except FinetuneError as error:
        log.warning(f"the model card says nothing of recipe and data: {error.what}")
        return _Manifest()
