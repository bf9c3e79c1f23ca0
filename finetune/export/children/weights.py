"""Runs in a fresh process: third-party code alone compares every weight of a merged checkpoint with base + update.

Deliberately imports nothing of this package: the base is dequantised by transformers, the update is formed from PEFT's
own file by the flattening that PEFT documents, a GGUF file is read and dequantised by the `gguf` package. Called as
`python weights.py REQUEST.json`; prints `RESULT ` and JSON. Memory: one expert at a time.

Checked element by element, for the base's weight W, T = W + update and the written weight M:
bfloat16: M is T within half a step of bfloat16. MXFP4 rounded to nearest: in every block M is no further from T than W
is (W is on the same grid). Other rounding: the sums of what M keeps and misses of the update equal the exporter's. All
rounded experts: a sum over the bits and the place of every value equals the exporter's, so that a single wrong code
shows. Biases that compensate mean errors: moved as far as the exporter counted. All other tensors: M equals W. Every
value of configuration, tokenizer and chat template is what was meant, in a directory and in a GGUF file.
"""

import json
import os
import sys
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HALF_STEP = 2.0**-8  # of bfloat16, relative
FLOAT32_NOISE = 2.0**-20  # relative to the largest value: sums in another order
# llama.cpp's names
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip

Json = dict[str, Any]


class Tensors:
    """Tensors of a checkpoint directory, or of one file."""

    def __init__(self, path: str) -> None:
        files = (
            [path]
            if os.path.isfile(path)
            else sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".safetensors"))
        )
        self.place: dict[str, Any] = {}
        for each in files:
            file = safe_open(each, "pt")
            self.place |= dict.fromkeys(file.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        return self.place[name].get_tensor(name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Some rows of a tensor."""
        return self.place[name].get_slice(name)[first:last]

    def shape(self, name: str) -> list[int]:
        """Sizes of a tensor."""
        return self.place[name].get_slice(name).get_shape()

    def expert(self, name: str, number: int) -> torch.Tensor:
        """Float32 [in, out] of one expert, packed or not."""
        if name in self.place:
            return self.rows(name, number, number + 1)[0].float()
        blocks, scales = (self.rows(name + end, number, number + 1) for end in ("_blocks", "_scales"))
        return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0]


class Gguf:
    """The same tensors in a GGUF file, under the checkpoint's names."""

    def __init__(self, path: str) -> None:
        import gguf

        self.dequantise = gguf.quants.dequantize
        reader = gguf.GGUFReader(path)
        self.fields: dict[str, Any] = reader.fields
        self.place: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}

    def _values(self, name: str, part: Any = slice(None)) -> torch.Tensor:
        tensor = self.place[name]
        return torch.from_numpy(self.dequantise(tensor.data[part], tensor.tensor_type).copy()).float()

    def read(self, name: str) -> torch.Tensor:
        """Float32 tensor under the checkpoint's name."""
        if name in NAMES:
            return self._values(NAMES[name])
        _, _, layer, rest = name.split(".", 3)
        if rest == "self_attn.sinks":
            return self._values(f"blk.{layer}.attn_sinks.weight")
        if rest == "mlp.experts.down_proj_bias":
            return self._values(f"blk.{layer}.ffn_down_exps.bias")
        if rest == "mlp.experts.gate_up_proj_bias":
            pair = [self._values(f"blk.{layer}.ffn_{half}_exps.bias") for half in ("gate", "up")]
            return torch.stack(pair, dim=-1).flatten(-2)
        module, _, kind = rest.rpartition(".")
        return self._values(f"blk.{layer}.{PARTS[module]}.{kind}")

    def expert(self, name: str, number: int) -> torch.Tensor:
        """Float32 [in, out] of one expert."""
        layer = name.split(".")[2]
        if name.endswith("down_proj"):
            return self._values(f"blk.{layer}.ffn_down_exps.weight", number).T
        pair = [self._values(f"blk.{layer}.ffn_{half}_exps.weight", number) for half in ("gate", "up")]
        return torch.stack(pair, dim=1).flatten(0, 1).T  # rows interleave: gate, up, gate, ...


class Check:
    """Compares tensors and remembers what is wrong."""

    def __init__(self, request: Json) -> None:
        self.experts_packed = request["experts"] == "mxfp4"
        self.nearest = request["rounding"] == "nearest"
        self.expected = request["updates"]
        self.counted = request["sums"]
        self.moved = set(request["moved"])
        self.problems: dict[str, str] = {}
        self.updates: dict[str, dict[str, float]] = {}
        self.checksums: dict[str, int] = {}
        self.compared = 0

    def expect(self, name: str, holds: bool, message: str) -> None:
        """Note a problem, the first of each tensor."""
        if not holds:
            self.problems.setdefault(name, message)

    def compare(
        self, name: str, base: torch.Tensor, update: torch.Tensor | None, merged: torch.Tensor, packed: bool
    ) -> None:
        """Float32 tensors of one shape; packed: [in, out], blocks of 32 along `in`."""
        self.compared += 1
        if base.shape != merged.shape:
            self.expect(name, False, f"shape {list(merged.shape)}, the base has {list(base.shape)}")
            return
        self.expect(name, bool(merged.isfinite().all()), "values that are not finite")
        if name in self.moved:
            update = merged - base  # any: how large it may be is in the exporter's count
        if update is None:
            self.expect(name, torch.equal(base, merged), "differs from the base, though the adapter leaves it alone")
            return
        target = base + update
        if packed:
            far, near = ((value - target).square().T.unflatten(-1, (-1, 32)).sum(-1) for value in (merged, base))
            wrong = (far > near * (1 + 1e-4) + 1e-12 * float(target.abs().max()) ** 2) & self.nearest
        else:
            noise = FLOAT32_NOISE * float(base.abs().max() + update.abs().max())
            wrong = (merged - target).abs() > target.abs() * HALF_STEP + noise
        self.expect(name, not bool(wrong.any()), f"{int(wrong.sum())} places are not base + update, correctly rounded")
        sums = self.updates.setdefault(name, {"wanted": 0.0, "found": 0.0, "kept": 0.0})
        change = merged - base
        for key, value in (("wanted", update * update), ("found", change * change), ("kept", change * update)):
            sums[key] += float(value.sum(dtype=torch.float64))

    def norms(self) -> dict[str, dict[str, float]]:
        """Norm of each update: as the exporter counted it, as it is by PEFT's file, as it is in the result."""
        table = {}
        for name, sums in self.updates.items():
            wanted, found = sums["wanted"] ** 0.5, sums["found"] ** 0.5
            counted = self.expected.get(name, self.expected.get(name + "_blocks", self.expected.get(name + ".weight")))
            agrees = counted is not None and abs(counted - wanted) <= 1e-3 * wanted + 1e-30
            self.expect(name, agrees, f"the update's norm is {wanted:.6g}, the exporter counted {counted}")
            expected = self.counted.get(name + "_blocks", {}).get("checksum")
            if expected is not None:
                same = self.checksums[name] % 2**64 == expected
                self.expect(name, same, "values that are not those the exporter rounded to")
            if not self.nearest and (packed := self.counted.get(name + "_blocks")):
                missed = sums["wanted"] - 2 * sums["kept"] + sums["found"]
                slack = 1e-4 * (sums["wanted"] + sums["found"]) + 1e-30
                agrees = abs(sums["kept"] - packed["kept"]) <= slack and abs(missed - packed["missed"]) <= slack
                self.expect(name, agrees, f"keeps {sums['kept']:.6g} of the update, the exporter counted {packed}")
            projection = sums["kept"] / sums["wanted"] if wanted else 1.0
            table[name] = {"expected": wanted, "found": found, "projection": projection}
        return table


def main(request_path: str) -> None:
    """Compare, print."""
    with open(request_path) as file:
        request = json.load(file)
    base, adapter, check = Tensors(request["base"]), Tensors(request["adapter"]), Check(request)
    merged: Tensors | Gguf = (
        Gguf(request["merged"]) if request["merged"].endswith(".gguf") else Tensors(request["merged"])
    )
    if isinstance(merged, Tensors):
        keys(check, base, merged, request)
        directory_settings(check, request)
    else:
        gguf_settings(check, merged, request)
    sites = {site["module"]: site for site in request["sites"]}
    for name in base.place:
        if name.endswith("_scales"):
            continue
        try:
            if name.endswith("_blocks"):
                experts(check, base, adapter, merged, name.removesuffix("_blocks"), sites)
            else:
                module = name.removesuffix(".weight")
                site = sites.get(module) if name.endswith(".weight") else None
                delta = site and site["scale"] * (adapter.read(site["b"]).float() @ adapter.read(site["a"]).float())
                if name in request["biases"]:  # of a router, which no factors hold
                    delta = torch.tensor(request["biases"][name])
                check.compare(
                    module if site else name, base.read(name).float(), delta, merged.read(name).float(), False
                )
        except Exception as error:  # a tensor that is missing or cannot be read is a finding, not a crash
            check.expect(name, False, f"{type(error).__name__}: {error}")
    updates = check.norms()
    answer = {"problems": check.problems, "compared": check.compared, "updates": updates}
    print("RESULT " + json.dumps(answer))


def experts(check: Check, base: Tensors, adapter: Tensors, merged: Tensors | Gguf, name: str, sites: Json) -> None:
    """One projection of one layer, expert by expert."""
    num_experts, site = base.shape(name + "_blocks")[0], sites.get(name)
    if site:
        a, b = adapter.read(site["a"]).float(), adapter.read(site["b"]).float()
        a, b = a.reshape(num_experts, site["rank"], -1), b.reshape(len(b), site["rank"], num_experts)
    for number in range(num_experts):
        delta = site and site["scale"] * torch.einsum("or,ri->io", b[:, :, number], a[number])
        found = merged.expert(name, number)
        check.compare(name, base.expert(name, number), delta, found, check.experts_packed)
        if site and check.experts_packed:
            check.checksums[name] = check.checksums.get(name, 0) + places_and_bits(found) * (2 * number + 1)


def places_and_bits(values: torch.Tensor) -> int:
    """Sum over float32 [in, out] of each value's bits times an odd number of its place, modulo 2^64."""
    columns, rows = values.shape
    odd = 1 + 2 * torch.arange(columns)[:, None] + 2 * 1_000_003 * torch.arange(rows)
    return int(((values + 0.0).view(torch.int32).long() * odd).sum())


def keys(check: Check, base: Tensors, merged: Tensors, request: Json) -> None:
    """Names and shapes: of the base where experts stay packed, of transformers' own model where they do not."""
    if check.experts_packed:
        wanted = {name: base.shape(name) for name in base.place}
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(request["merged"]))
        wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | merged.place.keys()):
        check.expect(name, name in merged.place, "missing")
        check.expect(name, name in wanted, "unexpected")
        if name in wanted and name in merged.place:
            shape = merged.shape(name)
            check.expect(name, shape == wanted[name], f"shape {shape} where {wanted[name]} is expected")


def directory_settings(check: Check, request: Json) -> None:
    """Every value of configuration and tokenizer is the base's, but for quantization_config of a bfloat16 merge."""
    for name in SETTINGS:
        wanted, found = (os.path.join(request[place], name) for place in ("base", "merged"))
        if os.path.exists(wanted) != os.path.exists(found):
            check.expect(name, False, "missing" if os.path.exists(wanted) else "unexpected")
        elif os.path.exists(wanted):
            meant, here = (content_of(path) for path in (wanted, found))
            if name == "config.json" and not check.experts_packed:
                meant.pop("quantization_config", None)
            check.expect(name, meant == here, difference(meant, here))
    path = os.path.join(request["merged"], "chat_template.jinja")
    if request["template"] is not None:
        here = content_of(path) if os.path.exists(path) else None
        check.expect("chat_template.jinja", here == request["template"], "is not the template that was meant")


def content_of(path: str) -> Any:
    """A JSON file's value, another file's text."""
    with open(path, encoding="utf-8") as file:
        return json.load(file) if path.endswith(".json") else file.read()


def difference(meant: Any, here: Any, place: str = "") -> str:
    """Where two values of JSON first differ, and how."""
    if isinstance(meant, dict) and isinstance(here, dict):
        key = next((key for key in (*meant, *here) if meant.get(key, here) != here.get(key, meant)), None)
        return "" if key is None else difference(meant.get(key), here.get(key), f"{place}.{key}".lstrip("."))
    if isinstance(meant, list) and isinstance(here, list) and len(meant) == len(here):
        number = next((number for number, value in enumerate(meant) if value != here[number]), None)
        return "" if number is None else difference(meant[number], here[number], f"{place}[{number}]")
    return f"{place} is {str(here)[:80]!r} where {str(meant)[:80]!r} is meant"


def gguf_settings(check: Check, merged: Gguf, request: Json) -> None:
    """Every setting and every token of a GGUF file, against the base's own configuration and tokenizer."""
    import gguf

    config = content_of(os.path.join(request["base"], "config.json"))
    special = gguf.SpecialVocab(request["base"], load_merges=True, n_vocab=config["vocab_size"])
    wanted = {f"gpt-oss.{key}": value for key, value in hyperparameters(config).items()}
    tokens, kinds = vocabulary(request["base"], config["vocab_size"])
    wanted |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o", "tokenizer.ggml.tokens": tokens}
    wanted |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": list(special.merges)}
    names = {"eos": "eos", "bos": "bos", "pad": "padding", "unk": "unknown", "sep": "seperator"}
    wanted |= {f"tokenizer.ggml.{names.get(k, k)}_token_id": v for k, v in special.special_token_ids.items()}
    if request["template"] is not None:
        wanted["tokenizer.chat_template"] = request["template"]
    for name, value in wanted.items():
        field = merged.fields.get(name)
        if field is None:
            check.expect(name, False, "missing")
            continue
        here = field.contents()
        same = abs(here - value) <= 1e-6 * abs(value) if isinstance(value, float) else here == value
        check.expect(name, same, difference(value, here))
    for name in merged.fields:
        is_id = name.endswith("_token_id") or name.startswith("gpt-oss.")
        check.expect(name, name in wanted or not is_id, "unexpected")


def hyperparameters(config: Json) -> Json:
    """llama.cpp's names of config.json's values."""
    newer = config.get("rope_parameters") or {}
    scaling = dict(config.get("rope_scaling") or newer)
    active = config.get("num_experts_per_tok", config.get("experts_per_token"))
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_count": config["num_local_experts"],
        "expert_used_count": active,
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"] if "rope_theta" in config else newer["rope_theta"]),
    }
    if scaling.get("rope_type") == "yarn":
        context = scaling.get("original_max_position_embeddings", config.get("initial_context_length", 4096))
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"])}
        values["rope.scaling.original_context_length"] = context
    return values


def vocabulary(base: str, size: int) -> tuple[list[str], list[int]]:
    """Every token's text and llama.cpp's kind of it: 1 normal, 3 control, 4 defined by the user, 5 unused."""
    tokenizer = content_of(os.path.join(base, "tokenizer.json"))
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [5] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], kinds[number] = token, 1
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3 if added["special"] else 4
    return tokens, kinds


if __name__ == "__main__":
    main(sys.argv[1])
