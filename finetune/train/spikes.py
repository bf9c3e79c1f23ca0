"""Notes a step whose loss lies far above those before it: bad rows, or a learning rate on the edge."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 64  # steps looked back on
FEWEST = 16  # before that, nothing is usual yet
DEVIATIONS = 6.0  # of a Gaussian as wide as the window: one step in a thousand million by chance
SMALLEST_SHARE = 0.1  # of the usual loss: on a flat curve six deviations are nothing to speak of
_MAD_TO_DEVIATION = 1.4826  # of a Gaussian


class LossSpikes:
    """Losses of the last steps, and whether the next one is out of their range.

    Median and median deviation are used, which the spike itself hardly moves.

    Args:
        losses: of the steps so far, so that a resumed run notes what the uninterrupted one would.
    """

    def __init__(self, losses: Iterable[float]) -> None:
        self._window = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def usual_if_spike(self, loss: float) -> float | None:
        """Take in a step's loss.

        Returns:
            The usual loss, if this one lies far above it; None otherwise.
        """
        window = list(self._window)
        self._window.append(loss)
        if len(window) < FEWEST:
            return None
        usual = median(window)
        deviation = _MAD_TO_DEVIATION * median(abs(value - usual) for value in window)
        far = loss - usual > max(DEVIATIONS * deviation, SMALLEST_SHARE * abs(usual))
        return usual if far else None
