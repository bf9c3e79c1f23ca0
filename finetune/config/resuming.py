"""A resumed run keeps its configuration, except for the processes that carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from finetune.config.groups import checked_option, option_file
from finetune.config.layers import COMMAND_LINE, Layer, read_yaml
from finetune.config.problems import raise_problems
from finetune.config.refuse import unknown_keys
from finetune.config.schema import RunConfig
from finetune.config.validate import to_plain, validate
from finetune.errors import ConfigError


def resumed_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Put other processes under a run.

    A step's rows stay the same: with another number of processes each makes more or fewer micro-steps.

    Args:
        config: as the run was started.
        overrides: `distributed=KIND` and `distributed.KEY=VALUE`.

    Raises:
        ConfigError: they cannot be read, or the step's micro-steps cannot be dealt to that many processes.
    """
    plain = to_plain(config)
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "distributed":
            option = checked_option("distributed", value, COMMAND_LINE)
            plain["distributed"] = dict(read_yaml(option_file("distributed", option)).data)
    given = {
        key.removeprefix("distributed."): yaml.safe_load(value)
        for key, _, value in (text.partition("=") for text in overrides)
        if key != "distributed"
    }
    layer = Layer(COMMAND_LINE, {"distributed": given}, {("distributed", key): None for key in given})
    raise_problems(list(unknown_keys(layer)), [layer])
    plain["distributed"] |= given
    _deal_anew(plain, config)
    return validate(plain, [layer])


def _deal_anew(plain: dict[str, Any], config: RunConfig) -> None:
    """Keep the micro-steps of a step in all."""
    processes = plain["distributed"]["num_processes"]
    in_all = config.trainer.gradient_accumulation_steps * config.distributed.num_processes
    if not isinstance(processes, int) or processes < 1:
        return  # `validate` says so
    if in_all % processes:
        counts = [str(count) for count in range(1, in_all + 1) if in_all % count == 0]
        raise ConfigError(
            f"{processes} processes cannot share the {in_all} micro-steps of a step evenly",
            why="a resumed run keeps the rows of every step",
            fix=f"resume with {', '.join(counts)} processes",
        )
    plain["trainer"]["gradient_accumulation_steps"] = in_all // processes
