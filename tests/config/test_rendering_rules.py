"""Settings on rendering that contradict each other, or train nothing, are refused by name."""

from __future__ import annotations

import pytest

from finetune.config.compose import compose
from finetune.errors import ConfigError

REFUSED = [
    (["data.loss.final=-1"], "data.loss.final is -1, must be 0 or more"),
    (["data.loss.analysis=nan"], "data.loss.analysis is nan"),
    ([f"data.loss.{name}=0" for name in ("analysis", "commentary", "tool_call", "final")], "every weight is 0"),
    (["data.loss.user=1"], "data.loss.user is not a key"),
    (["data.loss.tool_cal=1"], "did you mean data.loss.tool_call?"),
    (["data.earlier_thinking=split", "data.loss.turns=last"], "makes an example of every turn"),
    (["data.convention=template", "data.earlier_thinking=keep"], "the template always drops earlier thinking"),
    (["data.convention=template", "data.tool_call_type=constrain"], "the template writes json"),
    (["data.convention=jinja"], "data.convention"),
    (["data.model_identity=''"], "data.model_identity is empty"),
    (["data.train.cuad.form=chatml"], "data.train.cuad.form"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("quickstart", overrides)
    assert words in str(caught.value)


def test_let_through() -> None:
    """Negative control: each setting alone, and those that fit together."""
    for overrides in (
        ["data.earlier_thinking=split", "data.loss.turns=all"],
        ["data.earlier_thinking=keep", "data.loss.turns=last"],
        ["data.convention=template", "data.earlier_thinking=split", "data.tool_call_type=json"],
        ["data.loss.analysis=0", "data.loss.final=2"],
    ):
        compose("quickstart", overrides)
