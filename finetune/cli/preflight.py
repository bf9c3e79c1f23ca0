"""Memory around a run: refuse what will not fit before anything is downloaded, and explain it where it did not."""

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
from finetune.data.dataset import describe, load_split
from finetune.data.sources import split_names
from finetune.errors import CapacityError, ConfigError, InputError, is_out_of_memory
from finetune.estimate.advice import cheapest_changes
from finetune.estimate.fit import Budget, fit
from finetune.estimate.inputs import BaseInfo, find_base
from finetune.estimate.report import change_lines, make_estimate, memory_lines, verdict
from finetune.files import read_json
from finetune.machine import free_memory


def check_memory(config: RunConfig) -> None:
    """Estimate a run on the device that it will use, and say in a line that it fits.

    Raises:
        CapacityError: it does not, every process holds the whole base, and the recipe does not say to go on all the
            same.
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
        log.warning(f"memory, estimated: {verdict(result)}; going on, as trainer.ignore_memory_estimate says")
    elif config.distributed.kind in SHARDED_BASE:
        log.warning(
            f"memory, estimated: {verdict(result)}; going on, since the estimate for distributed.kind="
            f"{config.distributed.kind} has not been held against a GPU yet"
        )
    else:
        estimate = make_estimate(config, "", base, budget)
        raise CapacityError(
            f"memory, estimated: {verdict(result)}",
            why=_indented(memory_lines(result.memory)),
            fix=_indented(
                [
                    *change_lines(estimate.changes, estimate.enough),
                    "or try it all the same: trainer.ignore_memory_estimate=true",
                ]
            ),
        )


def device_budget(config: RunConfig) -> Budget:
    """Memory of the device that a recipe would use on this machine. Imports torch."""
    from finetune.machine import gpu_memory
    from finetune.model.open import choose_device

    device = choose_device(config.model)
    if device.type != "cuda":
        return Budget.of_host(free_memory())
    gpu = gpu_memory(device)
    return Budget.of_gpu(gpu.name, gpu.total_bytes, gpu.free_bytes)


@contextmanager
def explained_out_of_memory(config: RunConfig | None) -> Iterator[None]:
    """Turn memory that ran out inside the block into the parts of the step and the cheapest changes.

    Args:
        config: of the run. None: not known, and nothing is added.

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
    # Whatever the estimate said, it did not fit; so no change is claimed to be enough.
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


# `finetune train RECIPE --dry-run`: everything that can be known without a model, in seconds and without torch.


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
        default = "" if difference.before == ABSENT else f"  (default: {as_typed(difference.before)})"
        log.result(f"  {difference.key}: {as_typed(difference.after)}{default}")
    for line in [*derived_lines(config), *deepspeed_lines(config), *inputs]:
        log.result(line)
    for split in split_names(config.data):
        log.result(describe(load_split(config.data, split)))
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
    shape = Arch.from_config(read_json(path), str(path))
    experts = config.adapter.experts
    if experts.rank == 0 or (experts.select == "all" and experts.rank_by == "uniform"):
        return "adapter sites:\n" + describe_sites(plan_sites(shape, config.adapter), shape)
    selected = _likely(experts.select, shape)
    sites = describe_sites(plan_sites(shape, config.adapter, selected, _ranks(experts, selected, shape)), shape)
    chosen_by = [rule for rule in (experts.select, experts.rank_by) if rule not in ("all", "uniform")]
    return f"adapter sites, where the training data decide which experts ({', '.join(chosen_by)}):\n{sites}"


def _likely(select: str, shape: Arch) -> Selection | None:
    """As many experts as a run will adapt, where that is known before the data are looked at; None: all at most."""
    rule = parse_select(select)
    if rule.kind == "top_k":
        return dict.fromkeys(range(shape.num_layers), tuple(range(min(rule.top_k, shape.num_experts))))
    return read_expert_scores(Path(rule.path).expanduser()).selected if rule.kind == "file" else None


def _ranks(experts: ExpertAdapterConfig, selected: Selection | None, shape: Arch) -> ExpertRanks | None:
    """Ranks by use, where a file has it and says of which experts; None: not known yet, so the mean stands for them."""
    ranking, rule = parse_rank_by(experts.rank_by), parse_select(experts.select)
    if ranking.kind == "uniform" or rule.kind in ("top_p", "top_k"):
        return None
    if ranking.kind == "file":
        affinity, key = read_expert_scores(Path(ranking.path).expanduser(), "rank_by"), "rank_by"
    elif rule.kind == "file":
        affinity, key = read_expert_scores(Path(rule.path).expanduser()), "select"
    else:
        return None
    if [len(of_layer) for of_layer in affinity.gate] != [shape.num_experts] * shape.num_layers:
        raise InputError(f"adapter.experts.{key}: the file was measured on a base of another size")
    chosen = selected or dict.fromkeys(range(shape.num_layers), tuple(range(shape.num_experts)))
    if ranking.kind == "file" and affinity.ranks is not None:
        return given_ranks(affinity, chosen, experts, ranking.path)
    return ranks_of(affinity, affinity.by if ranking.kind == "file" else ranking.kind, chosen, experts)
