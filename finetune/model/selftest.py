"""A check on the live model at start-up: does one packed sample see another?

transformers' gpt-oss never passes position ids to its mask builder (transformers issue 39997), so packing with its own
masks lets a second document read the first: logits then differ by 3.67 where their standard deviation is 0.84. Ours go
around that; this proves it on the very model, device and dtype of the run, in both kinds of layer.
"""

from __future__ import annotations

import torch
from transformers import GptOssForCausalLM

from finetune.errors import CheckError
from finetune.model.forward import hidden_states

# Share of what a real leak gives on this very model. Rounding gives about 1e-6 of it in float32; in bfloat16 a token
# now and then takes another expert, which no GPU has measured on the large models yet, hence the wide margin.
LARGEST_SHARE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
NUM_PLAIN_TOKENS = 199_998  # the BPE ranks; ids above are control tokens


@torch.no_grad()
def packing_leak(model: GptOssForCausalLM, *, seed: int = 0, leak: bool = False) -> float:
    """How much a sample's hidden states change when another sample stands before it in the row.

    Args:
        model: a loaded base.
        seed: seed of the random tokens.
        leak: join the two samples on purpose, to see what this measure gives then.

    Returns:
        Root-mean-square difference relative to the hidden states' own root mean square.
    """
    length = model.config.sliding_window + 40  # long enough that the window cuts something off
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(NUM_PLAIN_TOKENS, (2, length), generator=generator) % model.config.vocab_size
    positions = torch.arange(length)
    alone = hidden_states(model, ids[1:], positions[None], torch.zeros(1, length, dtype=torch.long))[0]
    segments = torch.zeros(2 * length, dtype=torch.long) if leak else torch.arange(2).repeat_interleave(length)
    packed = hidden_states(model, ids.reshape(1, -1), positions.repeat(2)[None], segments[None])[0, length:]
    difference = (packed - alone).float().square().mean().sqrt()
    return (difference / alone.float().square().mean().sqrt()).item()


def check_packing(model: GptOssForCausalLM) -> float:
    """Run the check and return the leak as a share of what joining two samples on purpose gives.

    Raises:
        CheckError: packed samples see each other.
    """
    was_training = model.training
    model.eval()
    share = packing_leak(model) / packing_leak(model, leak=True)
    model.train(was_training)
    if not share < LARGEST_SHARE[model.lm_head.weight.dtype]:
        raise CheckError(
            f"packed samples are not separate: a neighbour changes hidden states by {share:.2g} of what a leak would",
            why="training on this would teach the model to read across unrelated documents",
            fix="set data.pack=false to train without packing, and report your torch and transformers versions",
        )
    return share
