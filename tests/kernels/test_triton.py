"""The fused expert block without a GPU: run by Triton's interpreter, compiled for GPUs, chosen or refused."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_expert_block import Case

from finetune.errors import MachineError
from finetune.kernels.choice import ExpertDims, choose_expert_kernel, triton_missing
from finetune.kernels.dispatch import Dispatch
from finetune.kernels.grouped import grouped, grouped_outer

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here (Linux only)")
TESTS = Path(__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PUBLISHED = ExpertDims(hidden=2880, width=2880, experts_per_chunk=16)


@needs_triton
def test_in_the_interpreter() -> None:
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(TESTS / "interpreted_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout and int(re.findall(r"(\d+) passed", done.stdout)[0]) > 30


# The arguments of launches with the published dims at rank 16; the rest is a 32-bit integer or a float.
POINTERS = {
    "words": "*i32", "scales": "*u8", "order": "*i64", "position": "*i64", "grad_row_weights": "*fp32",
    "lora_b": "*fp32",
}  # fmt: skip
ANY_BF16 = {
    "bias", "out", "source", "hidden", "grad_out", "grad_lora", "row_weights", "activated", "rows", "weights",
    "x", "cos", "sin",
}  # fmt: skip
CONSTANTS = {
    "augment_kernel": dict(groups=90, rank=16, W=128, UNROLL=4, TAIL_ROWS=64, TAIL_COLUMNS=32),
    "gather_kernel": dict(top_k=4, rank=16, R=4, C=512),
    "swiglu_kernel": dict(rank=16, R=4, C=256),
    "swiglu_backward_kernel": dict(width=2880, rank=16, has_lora=True, R=4, C=256),
    "combine_kernel": dict(top_k=4, weighted=True, R=4, C=512),
    "rotary_kernel": dict(half=32, R=32, C=32),
}
# Most shared memory that a block may have, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def compiled(name: str, capability: int):  # type: ignore[no-untyped-def]
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from finetune.kernels import experts_triton, rotary_triton

    module = rotary_triton if name == "rotary_kernel" else experts_triton
    function, constants = getattr(module, name), CONSTANTS[name]
    signature = {}
    for argument in function.arg_names:
        kind = "fp32" if argument in ("limit", "gain") else "i32"
        kind = "*bf16" if argument in ANY_BF16 else POINTERS.get(argument, kind)
        signature[argument] = "constexpr" if argument in constants else kind
    # As the launcher finds them: allocations, widths and padding are multiples of 16, numbers of rows are anything.
    even = [key for key, kind in signature.items() if kind[0] == "*" or (kind == "i32" and key in ("width", "pad"))]
    places = function.arg_names.index
    source = ASTSource(
        function,
        signature,
        constexprs={(places(key),): value for key, value in constants.items()},
        attrs={(places(key),): [["tt.divisibility", 16]] for key in even},
    )
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def resources(cubin: bytes, directory: Path) -> dict[str, int]:
    """Registers, stack (spills), local and static shared memory, as reported by the assembler."""
    import triton

    (directory / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-res-usage", str(directory / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", CONSTANTS)
def test_compiles_without_spills(name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compiled(name, capability)
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 255
    assert max(kernel.metadata.shared, used["SHARED"]) <= SHARED_BYTES[capability]
    assert ".ftz" not in kernel.asm["ptx"], "0.5 would come out as 0: its bits are a subnormal number"
    assert re.search(r"st\.global\S*\.v4", kernel.asm["ptx"]), "stores of 16 bytes"


@needs_triton
def test_compiled_constants_are_those_of_the_launches() -> None:
    """The compile test is valid only while its tiles are those in use."""
    from finetune.kernels import experts_triton as launch
    from finetune.kernels import rotary_triton

    assert CONSTANTS["rotary_kernel"]["R"] == rotary_triton.ROWS

    augment = CONSTANTS["augment_kernel"]
    assert (augment["W"], augment["UNROLL"]) == (launch.WORDS, launch.UNROLL)
    assert augment["TAIL_ROWS"] * augment["TAIL_COLUMNS"] == launch.TAIL_ELEMENTS
    assert augment["TAIL_COLUMNS"] == launch.padding(16)
    for name, columns in (
        ("gather_kernel", launch.COLUMNS),
        ("combine_kernel", launch.COLUMNS),
        ("swiglu_kernel", launch.PAIR_COLUMNS),
    ):
        assert (CONSTANTS[name]["R"], CONSTANTS[name]["C"]) == (launch.ROWS, columns)
    assert CONSTANTS["swiglu_backward_kernel"]["C"] == launch.PAIR_COLUMNS


def test_the_loop_over_experts_equals_the_grouped_product() -> None:
    """The path of GPUs whose grouped product would synchronise with the host."""
    case = Case(E=8, D=32, F=64, L=4, T=20, K=2, used=3)
    for chunk in Dispatch.of(case.ids, 8, 4).chunks():
        rows = torch.randn(chunk.stop - chunk.start, 32)
        matrices, other = torch.randn(4, 64, 32), torch.randn(len(rows), 64)
        assert len(chunk.counts) == 4 and 0 in chunk.counts
        for product, right in ((grouped, matrices.transpose(1, 2)), (grouped_outer, other)):
            whole, looped = product(rows, right, chunk), product(rows, right, chunk, loop=True)
            torch.testing.assert_close(whole, looped, rtol=1e-5, atol=1e-5)
        assert grouped_outer(rows, other, chunk)[chunk.counts.index(0)].count_nonzero() == 0


def test_chunks_cover_every_routed_token_once() -> None:
    ids = torch.tensor([[5, 1], [1, 5], [6, 1]])
    dispatch = Dispatch.of(ids, 7, 3)
    chunks = list(dispatch.chunks())
    assert [(c.first, c.last, c.start, c.stop, c.counts) for c in chunks] == [
        (0, 3, 0, 3, [0, 3, 0]), (3, 6, 3, 5, [0, 0, 2]), (6, 7, 5, 6, [1]),
    ]  # fmt: skip
    assert [c.offsets.tolist() for c in chunks] == [[0, 3, 3], [0, 0, 2], [1]]
    assert [c.expert_of_routed().tolist() for c in chunks] == [[1, 1, 1], [2, 2], [0]]
    assert [list(c.spans()) for c in chunks] == [[(0, 0), (0, 3), (3, 3)], [(0, 0), (0, 0), (0, 2)], [(0, 1)]]
    assert dispatch.order.tolist() == [1, 2, 5, 0, 3, 4], "ties keep token order"
    assert dispatch.inverse_order()[dispatch.order].tolist() == list(range(6))


class TestChoice:
    def test_without_a_gpu(self) -> None:
        choice = choose_expert_kernel("auto", PUBLISHED, CPU, torch.float32)
        assert choice.describe() == "expert kernel: reference (no CUDA device)"

    def test_demanded_without_a_gpu(self) -> None:
        with pytest.raises(MachineError, match="is triton, but no CUDA device") as caught:
            choose_expert_kernel("triton", PUBLISHED, CPU, torch.float32)
        assert caught.value.exit_code == 5 and "auto" in str(caught.value)

    @pytest.fixture
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """A simulated machine whose properties a test may change; the comparison at start-up does not run."""
        machine = SimpleNamespace(capability=(9, 0), missing=None, difference=0.01)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made Up 100")
        monkeypatch.setattr("finetune.kernels.choice.triton_missing", lambda: machine.missing)
        monkeypatch.setattr("finetune.kernels.choice.triton_difference", lambda *_: machine.difference)
        monkeypatch.setattr("finetune.kernels.choice.version", lambda _: "3.6.0")
        monkeypatch.setattr("finetune.kernels.choice.runs_in_one_launch", lambda _: machine.capability[0] in (9, 10))
        return machine

    def test_on_hopper(self, hopper: SimpleNamespace) -> None:
        choice = choose_expert_kernel("auto", PUBLISHED, GPU, torch.bfloat16)
        assert choice.describe() == "expert kernel: triton (CUDA, sm_90, triton 3.6.0)"
        assert choose_expert_kernel("reference", PUBLISHED, GPU, torch.bfloat16).kernel == "reference"

    def test_on_ampere(self, hopper: SimpleNamespace) -> None:
        hopper.capability = (8, 0)
        choice = choose_expert_kernel("triton", PUBLISHED, GPU, torch.bfloat16)
        assert choice.kernel == "triton" and "expert by expert" in choice.reason

    @pytest.mark.parametrize(
        ("facts", "shape", "dtype", "reason"),
        [
            ({"capability": (7, 5)}, PUBLISHED, torch.bfloat16, "Made Up 100 is sm_75"),
            ({"missing": "triton is not installed"}, PUBLISHED, torch.bfloat16, "triton is not installed"),
            ({}, PUBLISHED, torch.float32, "bfloat16, not float32"),
            ({}, ExpertDims(2880, 2888, 16), torch.bfloat16, "the expert width is 2888"),
            ({}, ExpertDims(2880, 2880, 2000), torch.bfloat16, "more than it can count"),
            ({"difference": 0.5}, PUBLISHED, torch.bfloat16, "differ from the reference's by 0.5"),
            ({"difference": float("nan")}, PUBLISHED, torch.bfloat16, "differ from the reference's by nan"),
        ],
    )
    def test_obstacles(self, hopper, facts, shape, dtype, reason) -> None:  # type: ignore[no-untyped-def]
        vars(hopper).update(facts)
        choice = choose_expert_kernel("auto", shape, GPU, dtype)
        assert choice.kernel == "reference" and reason in choice.reason
        assert "slower" in choice.reason and "\n" not in choice.describe()
        with pytest.raises(MachineError, match=r"is triton, but"):
            choose_expert_kernel("triton", shape, GPU, dtype)

    def test_a_kernel_that_does_not_launch(self, hopper: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object) -> float:
            raise RuntimeError("no kernel image\nfor this device")

        monkeypatch.setattr("finetune.kernels.choice.triton_difference", fails)
        choice = choose_expert_kernel("auto", PUBLISHED, GPU, torch.bfloat16)
        assert choice.kernel == "reference" and "RuntimeError: no kernel image;" in choice.reason

    def test_missing_and_old_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert "not installed" in str(triton_missing())
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
        monkeypatch.setattr("finetune.kernels.choice.version", lambda _: "3.5.1")
        assert "needs 3.6" in str(triton_missing()) or "need 3.6" in str(triton_missing())
        monkeypatch.setattr("finetune.kernels.choice.version", lambda _: "3.10.0+git1")
        assert triton_missing() is None
