"""Every decode kernel compiles without a GPU, in the 350M shape, and its machine code is checked.

This says nothing about speed or results on a device.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from albor_serve.kernels import phases
from albor_serve.kernels.aot import CAPABILITIES, check, compile_kernel
from albor_serve.kernels.exchange import attention_asm
from albor_serve.kernels.persistent import step_kernel
from albor_serve.kernels.sampling import NUM_WARPS, choose_kernel

_KERNELS: dict[str, dict[str, Any]] = {
    "embed_kernel": {"KT": 8, "KB": 1024, "NK": 256, "D": 64, "PB": 64, "PBP": 64,
                     "FEEDBACK": True},
    "qkv_kernel": {"N": 1536, "KT": 8, "PB": 64, "NEXT": 36864},
    "attention_one_kernel": {"H": 16, "HKV": 4, "D": 64, "GP": 4, "QH": 8, "RL": 8, "NR": 4,
                             "S": 7, "QK_NORM": True, "NEXT": 18432},
    "attention_kernel": {"H": 16, "HKV": 4, "D": 64, "GP": 4, "P": 64, "S": 16, "QK_NORM": True},
    "output_kernel": {"N": 1024, "KT": 8, "H": 16, "D": 64, "S": 8, "PB": 64, "NEXT": 6912},
    "gate_up_kernel": {"F": 4096, "KT": 8, "NB": 2, "PB": 64, "NEXT": 4608},
    "feed_forward_kernel": {"N": 1024, "KT": 32, "PB": 64},
    "head_kernel": {"V": 32768, "KT": 8, "PB": 64, "STORE": False},
}  # fmt: skip
_INTEGERS = {"w_ptr", "tokens_ptr", "pos_ptr", "next_ptr"}
_HALVES = {"k_ptr", "v_ptr", "x_ptr", "att_ptr", "act_ptr"}
_WORDS = {
    ("embed_kernel", "out_ptr"),
    ("qkv_kernel", "x_ptr"),
    ("gate_up_kernel", "x_ptr"),
    ("head_kernel", "x_ptr"),
    ("output_kernel", "att_ptr"),
    ("feed_forward_kernel", "act_ptr"),
}
"""Arguments that are read as int32."""


def _type(kernel: str, name: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "eps" else "i32"
    if name in _INTEGERS or (kernel, name) in _WORDS:
        return "*i32"
    return "*i64" if name == "keys_ptr" else "*fp16" if name in _HALVES else "*fp32"


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=[] if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
@pytest.mark.parametrize("vocab_size", [32_768, 151_936])
def test_the_choice_of_a_token_compiles_without_spills(capability: int, vocab_size: int) -> None:
    names = choose_kernel.arg_names
    constants = {"V": vocab_size, "NK": 256, "BLOCK": 8192, "NS": 32, "PDL": capability >= 90}
    floats = {"logits_ptr", "bias_ptr", "scores_ptr"}
    signature = {n: "*fp32" if n in floats else "*i32" for n in names if n.endswith("_ptr")}
    signature |= {"keys_ptr": "*i64", "num_keys": "i32"}
    options: dict[str, Any] = {"num_warps": NUM_WARPS, "num_stages": 1}
    compiled = compile_kernel(
        choose_kernel, signature, constants, capability=capability, options=options
    )
    assert check(compiled) == []


@pytest.mark.parametrize(
    ("capability", "num_tokens"),
    [
        pytest.param(80, 1, marks=pytest.mark.slow),
        pytest.param(86, 1, marks=pytest.mark.slow),
        pytest.param(89, 1),
        pytest.param(90, 1),
        pytest.param(90, 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", _KERNELS)
def test_kernel_compiles_without_spills(name: str, capability: int, num_tokens: int) -> None:
    if name == {1: "attention_kernel", 8: "attention_one_kernel"}[num_tokens]:
        pytest.skip("not for this many tokens")
    kernel = getattr(phases, name)
    common = {
        "M": num_tokens,
        "MP": num_tokens,
        "RP": max(16, 4 * num_tokens),
        "STREAM": True,
        "PDL": capability >= 90,
        "ASM": True,
        "W": 8,
    }
    wanted = {n: v for n, v in common.items() if n in kernel.arg_names}
    constants = {**wanted, **_KERNELS[name]}
    signature = {n: _type(name, n) for n in kernel.arg_names if n not in constants}
    options: dict[str, Any] = {"num_warps": common["W"], "num_stages": 1}
    if capability >= 90:
        options["launch_pdl"] = True
    compiled = compile_kernel(kernel, signature, constants, capability=capability, options=options)
    assert check(compiled) == []
    if "attention" not in name and name != "embed_kernel":
        assert compiled.count(r"LDG\.E[\w.]*\.128") >= 4, "weights and activations load narrowly"
        assert compiled.count("HMMA") >= 8
        waits = compiled.count(r"BAR\.")
        assert waits <= 4, f"{waits} barriers: something moves through shared memory needlessly"


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=[] if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
def test_the_persistent_kernel_compiles_in_the_embedded_models_shape(capability: int) -> None:
    code, constraints = attention_asm(64, 8, 9)
    constants: dict[str, Any] = {
        "PHASE": -1, "P": 132, "L": 8, "V": 16_384, "KT": 4, "KT_O": 4, "KT_FF": 12, "H": 8,
        "HKV": 4, "D": 64, "GP": 2, "QH": 8, "RL": 8, "NR": 4, "S": 8, "NB": 2, "NK": 256,
        "QK_NORM": True, "STORE": True, "STREAM": False, "BULK": capability >= 90, "COPIES": 2,
        "CODE": code, "CONSTRAINTS": constraints, "ASM": True, "W": 8,
    }  # fmt: skip
    words = {"x_ptr", "x_ff_ptr", "qkv_ptr", "att_ptr", "lse_ptr", "act_ptr", "best_ptr", "key_ptr"}
    integers = {"embedding_ptr", "qkv_w_ptr", "output_w_ptr", "gate_up_w_ptr", "down_w_ptr",
                "head_w_ptr", "attention_gain_ptr", "feed_forward_gain_ptr", "final_gain_ptr",
                "tokens_ptr", "pos_ptr", "out_ptr", "epoch_ptr", "zeros_ptr"}  # fmt: skip

    def kind(name: str) -> str:
        if not name.endswith("_ptr"):
            return "fp32" if name == "eps" else "i32"
        if name in words:
            return "*i64"
        halves = ("keys_ptr", "values_ptr")
        return "*i32" if name in integers else "*fp16" if name in halves else "*fp32"

    signature = {n: kind(n) for n in step_kernel.arg_names if n not in constants}
    compiled = compile_kernel(
        step_kernel, signature, constants, capability=capability,
        options={"num_warps": 8, "num_stages": 1},
    )  # fmt: skip
    # A few addresses that the compiler keeps for all layers do spill.
    assert [p for p in check(compiled) if "spill" not in p] == []
    assert compiled.stack_bytes <= 320
    assert compiled.count("HMMA") >= 8 * 7
