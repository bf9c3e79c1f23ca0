"""Whether an answer is a refusal, by how it begins."""

from __future__ import annotations

import re

_UNABLE = (
    r"(?:can ?not|can't|couldn't|could not|won't|will not|"
    r"(?:am|'m) (?:unable|not able|afraid i (?:cannot|can't)|not in a position)(?: to)?)"
)
_DECLINE = r"(?:(?:must|have to|need to|will|'ll|would|should)? ?(?:respectfully |politely )?(?:decline|refuse)\b)"
_VERBS = (
    "advise|analyse|analyze|answer|assist|categorise|categorize|classify|comment|complete|comply|continue|create|"
    "decide|determine|diagnose|discuss|do|engage|evaluate|fulfil|fulfill|generate|give|help|identify|offer|perform|"
    "produce|provide|recommend|respond|satisfy|say|share|support|tell|translate|write"
)
_APOLOGY = r"(?:(?:(?:i am|i'm) )?(?:very |so |really )?sorry|i apologi[sz]e|my apologies|unfortunately|regrettably)"
_REFUSAL = re.compile(
    rf"(?:{_APOLOGY}\W+(?:but |that )?)?"
    rf"(?:as an? (?:ai|(?:large )?language model)\b"
    rf"|i ?{_UNABLE} (?:\w+ly |in good conscience )?(?:{_VERBS})\b"
    rf"|i ?{_DECLINE})"
    rf"|{_APOLOGY}(?:\W+but\b|\W*$)"  # an apology and nothing else answers nothing
)


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do: "I'm sorry, but", "I cannot classify", "I must decline", "As an AI".

    Only the beginning counts, and quoted speech does not: a story's people are sorry, too. A text may refuse in other
    words; the count compares two models, it is no measure of either.

    Args:
        text: of the final channel.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal('"I am sorry, but no," she said.')
    (True, False)
    """
    beginning = " ".join(text.replace("’", "'").casefold().split()).lstrip("*_# ")
    return _REFUSAL.match(beginning) is not None
