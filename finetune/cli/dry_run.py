"""`finetune train RECIPE --dry-run`: everything that can be known without a model, in seconds and without torch."""

from __future__ import annotations

from pathlib import Path

from finetune import log
from finetune.adapters.ranks import given_ranks, ranks_of
from finetune.adapters.sites import ExpertRanks, Selection, describe_sites, plan_sites
from finetune.config.affinity import read_affinity
from finetune.config.compose import ComposedConfig
from finetune.config.deepspeed import deepspeed_lines
from finetune.config.derive import check_inputs, derived_lines
from finetune.config.differences import ABSENT, defaults, differences, in_words
from finetune.config.expert_rules import parse_rank_by, parse_select
from finetune.config.locate import shipped_dir
from finetune.config.schema import ExpertAdapterConfig, RunConfig
from finetune.config.validate import to_plain
from finetune.data.dataset import describe, load_split
from finetune.data.splits import split_names
from finetune.errors import ConfigError, InputError
from finetune.estimate.fit import Budget, fit
from finetune.estimate.host import available_host_bytes
from finetune.estimate.shapes import find_base
from finetune.estimate.text import verdict
from finetune.model.headers import read_json
from finetune.model.shapes import ModelShape


def dry_run(recipe: str, composed: ComposedConfig) -> None:
    """Print what a recipe sets, what follows from it, what is in the data, what would be adapted, and the memory.

    Args:
        recipe: as it was given.
        composed: the checked recipe.

    Raises:
        FinetuneError: whatever a run would stop at before it loads a model.
    """
    config = composed.config
    if config.name is not None and (Path(config.output_dir) / config.name).exists():
        raise ConfigError(
            f"run directory {Path(config.output_dir) / config.name} exists already",
            why="a run is never overwritten",
            fix="choose another with name=...",
        )
    inputs = check_inputs(config)
    plain = to_plain(config)
    log.result(f"not at its default (`finetune config show {recipe}` prints every key):")
    for difference in differences(defaults(plain), plain):
        default = "" if difference.before == ABSENT else f"  (default: {in_words(difference.before)})"
        log.result(f"  {difference.key}: {in_words(difference.after)}{default}")
    for line in [*derived_lines(config), *deepspeed_lines(config), *inputs]:
        log.result(line)
    for split in split_names(config.data):
        log.result(describe(load_split(config.data, split)))
    log.result(_adapter(config))
    log.result(_memory(config))


def _memory(config: RunConfig) -> str:
    facts = find_base(config.model.path)
    if facts is None:
        return "memory: known once the base is here"
    budget = Budget.of_host(available_host_bytes()) if config.model.device == "cpu" else Budget.of_card(80)
    return f"memory, estimated: {verdict(fit(config, facts.shape, budget))}"


def _adapter(config: RunConfig) -> str:
    path = Path(config.model.path).expanduser() / "config.json"
    published = shipped_dir("data") / "tokenizer" / config.model.path.removeprefix("openai/") / "config.json"
    if not path.is_file():
        path = published
    if not path.is_file():
        return "adapter sites: known once the base is here"
    shape = ModelShape.from_config(read_json(path), str(path))
    experts = config.adapter.experts
    if experts.rank == 0 or (experts.select == "all" and experts.rank_by == "uniform"):
        return "adapter sites:\n" + describe_sites(plan_sites(shape, config.adapter), shape)
    selected = _likely(experts.select, shape)
    sites = describe_sites(plan_sites(shape, config.adapter, selected, _ranks(experts, selected, shape)), shape)
    chosen_by = [rule for rule in (experts.select, experts.rank_by) if rule not in ("all", "uniform")]
    return f"adapter sites, where the training data decide which experts ({', '.join(chosen_by)}):\n{sites}"


def _likely(select: str, shape: ModelShape) -> Selection | None:
    """As many experts as a run will adapt, where that is known before the data are looked at; None: all at most."""
    rule = parse_select(select)
    if rule.kind == "top_k":
        return dict.fromkeys(range(shape.num_layers), tuple(range(min(rule.top_k, shape.num_experts))))
    return read_affinity(Path(rule.path).expanduser()).selected if rule.kind == "file" else None


def _ranks(experts: ExpertAdapterConfig, selected: Selection | None, shape: ModelShape) -> ExpertRanks | None:
    """Ranks by use, where a file has it and says of which experts; None: not known yet, so the mean stands for them."""
    ranking, rule = parse_rank_by(experts.rank_by), parse_select(experts.select)
    if ranking.kind == "uniform" or rule.kind in ("top_p", "top_k"):
        return None
    if ranking.kind == "file":
        affinity, key = read_affinity(Path(ranking.path).expanduser(), "rank_by"), "rank_by"
    elif rule.kind == "file":
        affinity, key = read_affinity(Path(rule.path).expanduser()), "select"
    else:
        return None
    if [len(of_layer) for of_layer in affinity.gate] != [shape.num_experts] * shape.num_layers:
        raise InputError(f"adapter.experts.{key}: the file was measured on a base of another size")
    chosen = selected or dict.fromkeys(range(shape.num_layers), tuple(range(shape.num_experts)))
    if ranking.kind == "file" and affinity.ranks is not None:
        return given_ranks(affinity, chosen, experts, ranking.path)
    return ranks_of(affinity, affinity.by if ranking.kind == "file" else ranking.kind, chosen, experts)
