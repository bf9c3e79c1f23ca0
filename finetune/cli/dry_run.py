"""`finetune train RECIPE --dry-run`: everything that can be known without a model, in seconds and without torch."""

from __future__ import annotations

from pathlib import Path

from finetune.adapters.sites import describe_sites, plan_sites
from finetune.config.deepspeed import deepspeed_lines
from finetune.config.derive import check_inputs, derived_lines
from finetune.config.locate import shipped_dir
from finetune.config.schema import RunConfig
from finetune.config.validate import dump_yaml
from finetune.console import say
from finetune.data.dataset import describe, load_split
from finetune.data.splits import split_names
from finetune.errors import ConfigError
from finetune.model.headers import read_json
from finetune.model.shapes import ModelShape


def dry_run(config: RunConfig) -> None:
    """Print the configuration, what follows from it, what is in the data, and what would be adapted.

    Raises:
        FinetuneError: whatever a run would stop at before it loads a model.
    """
    if config.name is not None and (Path(config.output_dir) / config.name).exists():
        raise ConfigError(
            f"run directory {Path(config.output_dir) / config.name} exists already",
            why="a run is never overwritten",
            fix="choose another with name=...",
        )
    inputs = check_inputs(config)
    say(dump_yaml(config), result=True)
    for line in [*derived_lines(config), *deepspeed_lines(config), *inputs]:
        say(line, result=True)
    for split in split_names(config.data):
        say(describe(load_split(config.data, split)), result=True)
    say(_adapter(config), result=True)


def _adapter(config: RunConfig) -> str:
    path = Path(config.model.path).expanduser() / "config.json"
    published = shipped_dir("data") / "tokenizer" / config.model.path.removeprefix("openai/") / "config.json"
    if not path.is_file():
        path = published
    if not path.is_file():
        return "adapter sites: known once the base is here"
    shape = ModelShape.from_config(read_json(path), str(path))
    return "adapter sites:\n" + describe_sites(plan_sites(shape, config.adapter), shape)
