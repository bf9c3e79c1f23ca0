"""Checks before a run (memory, `--dry-run`), and the explanation when memory runs out during one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import log
from finetune.adapters.sites import ExpertRanks, Selection, describe_sites, given_ranks, plan_sites, ranks_of
from finetune.arch import Arch
from finetune.config.compose import ComposedConfig
from finetune.config.derive import check_inputs, deepspeed_lines, derived_lines
from finetune.config.differences import ABSENT, as_typed, defaults, differences
from finetune.config.expert_selection import parse_rank_by, parse_select, read_expert_scores
from finetune.config.paths import shipped_dir
from finetune.config.rules import SHARDED_BASE
from finetune.config.schema import ExpertAdapterConfig, RunConfig
from finetune.config.validate import to_plain
from finetune.data.dataset import describe, load_split, warn_of_control_text
from finetune.data.preferences import check_forms
from finetune.data.sources import split_names
from finetune.errors import CapacityError, ConfigError, InputError, is_out_of_memory
from finetune.estimate.advice import cheapest_changes
from finetune.estimate.fit import Budget, fit
from finetune.estimate.inputs import BaseInfo, find_base
from finetune.estimate.report import change_lines, make_estimate, memory_lines, verdict
from finetune.machine import free_memory


def check_memory(config: RunConfig) -> None:
    """Estimate the memory of a run on its device, and log the verdict.

    Raises:
        CapacityError: it does not fit, every rank has the whole base, and the recipe does not ignore the estimate.
    """
    base = find_base(config.model.path)
    if base is None:
        log.info(f"memory: not estimated, since config.json of {config.model.path} is not here yet")
        return
    budget = device_budget(config)
    result = fit(config, base.arch, budget)
    if result.fits:
        log.info(f"memory, estimated: {verdict(result)}")
    elif config.trainer.ignore_memory_estimate:
        log.warning(f"memory, estimated: {verdict(result)}; starting all the same (trainer.ignore_memory_estimate)")
    elif config.distributed.kind in SHARDED_BASE:
        log.warning(
            f"memory, estimated: {verdict(result)}; starting all the same, since the estimate for "
            f"distributed.kind={config.distributed.kind} has not been compared with a GPU yet"
        )
    else:
        estimate = make_estimate(config, "", base, budget)
        raise CapacityError(
            f"memory, estimated: {verdict(result)}",
            why=_indented(memory_lines(result.memory)),
            fix=_indented(
                [
                    *change_lines(estimate.changes, estimate.enough),
                    "or start all the same: trainer.ignore_memory_estimate=true",
                ]
            ),
        )


def device_budget(config: RunConfig) -> Budget:
    """Measure the memory of the device that a recipe would use on this machine. Imports torch."""
    from finetune.machine import gpu_memory
    from finetune.model.open import choose_device

    device = choose_device(config.model)
    if device.type != "cuda":
        return Budget.of_host(free_memory())
    gpu = gpu_memory(device)
    return Budget.of_gpu(gpu.name, gpu.total_bytes, gpu.free_bytes)


@contextmanager
def explained_out_of_memory(config: RunConfig | None) -> Iterator[None]:
    """Explain memory that runs out inside the block: the parts of a step and the cheapest changes.

    Args:
        config: the run's configuration. None: not known, and nothing is added.

    Raises:
        CapacityError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        base = find_base(config.model.path) if config is not None and is_out_of_memory(error) else None
        if config is None or base is None:
            raise
        raise _explanation(config, base, error) from error


def _explanation(config: RunConfig, base: BaseInfo, error: Exception) -> CapacityError:
    # It did not fit whatever the estimate said, so no change is claimed to be enough.
    nothing = Budget(0.0, "", device_budget(config).on_gpu)
    result = fit(config, base.arch, nothing)
    changes = cheapest_changes(config, base.arch, nothing)
    first = (str(error).splitlines() or ["no memory left"])[0]
    return CapacityError(
        f"out of memory: {first}",
        why=_indented(["the estimated parts of a step are:", *memory_lines(result.memory)]),
        fix=_indented(change_lines(changes, {})),
    )


def _indented(lines: list[str]) -> str:
    return "\n    ".join("\n".join(lines).splitlines())


def dry_run(recipe: str, composed: ComposedConfig) -> None:
    """Print everything about a run that needs neither a model nor torch: settings, data, adapter sites and memory.

    Args:
        recipe: as given on the command line.
        composed: the checked recipe.

    Raises:
        FinetuneError: any error that would stop a run before it loads a model.
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
        default = "" if difference.before == ABSENT else f"  (default: {as_typed(difference.before)})"
        log.result(f"  {difference.key}: {as_typed(difference.after)}{default}")
    for line in [*derived_lines(config), *deepspeed_lines(config), *inputs]:
        log.result(line)
    for name in split_names(config.data):
        split = load_split(config.data, name)
        log.result(describe(split))
        warn_of_control_text(split)
        check_forms(name, split.stats.forms, config.objective.kind, split.stats.labels)
    log.result(_adapter(config))
    log.result(_memory(config))


def _memory(config: RunConfig) -> str:
    base = find_base(config.model.path)
    if base is None:
        return "memory: known once the base is here"
    budget = Budget.of_host(free_memory()) if config.model.device == "cpu" else Budget.of_card(80)
    return f"memory, estimated: {verdict(fit(config, base.arch, budget))}"


def _adapter(config: RunConfig) -> str:
    path = Path(config.model.path).expanduser() / "config.json"
    published = shipped_dir("data") / "tokenizer" / config.model.path.removeprefix("openai/") / "config.json"
    if not path.is_file():
        path = published
    if not path.is_file():
        return "adapter sites: known once the base is here"
    shape = Arch.read(path)
    experts = config.adapter.experts
    if experts.rank == 0 or (experts.select == "all" and experts.rank_by == "uniform"):
        return "adapter sites:\n" + describe_sites(plan_sites(shape, config.adapter), shape)
    selected = _likely(experts.select, shape)
    sites = describe_sites(plan_sites(shape, config.adapter, selected, _ranks(experts, selected, shape)), shape)
    chosen_by = [rule for rule in (experts.select, experts.rank_by) if rule not in ("all", "uniform")]
    return f"adapter sites, if the training data selects the experts ({', '.join(chosen_by)}):\n{sites}"


def _likely(select: str, shape: Arch) -> Selection | None:
    """Select as many experts as a run will adapt, if that is known without the data; None: all at most."""
    rule = parse_select(select)
    if rule.kind == "top_k":
        return dict.fromkeys(range(shape.num_layers), tuple(range(min(rule.top_k, shape.num_experts))))
    return read_expert_scores(Path(rule.path).expanduser()).selected if rule.kind == "file" else None


def _ranks(experts: ExpertAdapterConfig, selected: Selection | None, shape: Arch) -> ExpertRanks | None:
    """Compute ranks by use if a file has the scores; None: not known yet, and the mean is printed instead."""
    ranking, rule = parse_rank_by(experts.rank_by), parse_select(experts.select)
    if ranking.kind == "uniform" or rule.kind in ("top_p", "top_k"):
        return None
    if ranking.kind == "file":
        scores, key = read_expert_scores(Path(ranking.path).expanduser(), "rank_by"), "rank_by"
    elif rule.kind == "file":
        scores, key = read_expert_scores(Path(rule.path).expanduser()), "select"
    else:
        return None
    if [len(of_layer) for of_layer in scores.gate] != [shape.num_experts] * shape.num_layers:
        raise InputError(f"adapter.experts.{key}: the file was measured on a base of another size")
    chosen = selected or dict.fromkeys(range(shape.num_layers), tuple(range(shape.num_experts)))
    if ranking.kind == "file" and scores.ranks is not None:
        return given_ranks(scores, chosen, experts, ranking.path)
    return ranks_of(scores, scores.by if ranking.kind == "file" else ranking.kind, chosen, experts)
