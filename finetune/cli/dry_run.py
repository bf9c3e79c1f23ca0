"""`finetune train RECIPE --dry-run`: everything that can be known without a model, in seconds and without torch."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.adapters.sites import describe_sites, plan_sites
from finetune.config.derive import check_inputs, derived_lines
from finetune.config.schema import RunConfig
from finetune.config.validate import dump_yaml
from finetune.console import say
from finetune.data.dataset import describe, load_split
from finetune.data.splits import split_names
from finetune.model.shapes import ModelShape


def dry_run(config: RunConfig) -> None:
    """Print the configuration, what follows from it, what is in the data, and what would be adapted.

    Raises:
        FinetuneError: whatever a run would stop at before it loads a model.
    """
    say(dump_yaml(config), result=True)
    for line in [*derived_lines(config), *check_inputs(config)]:
        say(line, result=True)
    for split in split_names(config.data):
        say(describe(load_split(config.data, split)), result=True)
    say(_adapter(config), result=True)


def _adapter(config: RunConfig) -> str:
    path = Path(config.model.path).expanduser() / "config.json"
    if not path.is_file():
        return "adapter sites: known once the base is here"
    shape = ModelShape.from_config(json.loads(path.read_text()), str(path))
    return "adapter sites:\n" + describe_sites(plan_sites(shape, config.adapter), shape)
