from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from albor_train.bench import Kernel, bench, kernel_table, profile, table
from albor_train.cli import main
from albor_train.errors import TrainingError
from albor_train.spec import load_spec
from tests.train.fixtures_train import write_tiny_spec

CPU = torch.device("cpu")
VARIANTS = [
    "plain",
    "nanogpt",
    "ours",
    "ours:attention=causal,chunk=64,rows=4",
    "ours:optimizer=adamw,mode=off",
    "ours:fused=on,head_dim=32,batch=2048,kernels=own,width=128,layers=1",
]


def test_each_variant_trains_and_is_timed(tmp_path: Path) -> None:
    spec = load_spec(write_tiny_spec(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    rows = bench(spec, VARIANTS, device=CPU, steps=4)
    assert [row.problem for row in rows] == [""] * len(VARIANTS)
    for row in rows:
        batch_tokens = 2048 if "batch" in row.variant else 1024
        assert row.tokens_per_s == pytest.approx(batch_tokens / (row.step_ms / 1e3))
        # Six steps on few rows, low ids more frequent: the loss falls below that of equal chances.
        assert row.loss < math.log(512), row.variant
    assert [row.update_ms > 0 for row in rows] == [False, False, True, True, True, True]
    assert all(row.update_ms < row.step_ms for row in rows)
    assert sorted(tmp_path.rglob("*")) == before
    text = table(rows)
    assert text.count("\n") == 2 + len(VARIANTS)
    assert "| plain |" in text
    assert "| 1.00 |" in text


def test_what_fails_or_comes_late_is_a_row(tmp_path: Path) -> None:
    spec = load_spec(write_tiny_spec(tmp_path))
    rows = bench(spec, ["ours:attention=document_varlen", "ours"], device=CPU, steps=1)
    assert "needs a CUDA device" in rows[0].problem
    assert not rows[1].problem
    assert "needs a CUDA device" in table(rows)
    odd, narrow = bench(spec, ["ours:head_dim=48", "ours:width=72"], device=CPU, steps=1)
    assert "can't be cut" in odd.problem
    assert "give a multiple" in narrow.problem
    (late,) = bench(spec, ["ours"], device=CPU, max_seconds=-1)
    assert late.problem.startswith("not begun")


def test_digests_tell_whether_two_runs_did_the_same(tmp_path: Path) -> None:
    spec = load_spec(write_tiny_spec(tmp_path))
    variants = ["ours:deterministic=on", "ours:deterministic=on", "ours:optimizer=adamw", "nanogpt"]
    first, second, other, peer = bench(spec, variants, device=CPU, steps=1)
    assert first.digest == second.digest != other.digest
    assert (len(first.digest), peer.digest) == (16, "")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("variant", ["theirs", "ours:colour=red", "plain:rows=2"])
def test_unknown_variants_are_refused(tmp_path: Path, variant: str) -> None:
    spec = load_spec(write_tiny_spec(tmp_path))
    with pytest.raises(TrainingError, match="is no variant"):
        bench(spec, ["ours", variant], device=CPU)


def test_a_profile_names_the_kernels(tmp_path: Path) -> None:
    text = profile(
        load_spec(write_tiny_spec(tmp_path)), "ours:mode=off", device=CPU, batch_tokens=512
    )
    assert "aten::mm" in text


def test_kernels_are_summed_by_kind_with_the_time_between_them() -> None:
    kernels = [
        Kernel("nvjet_sm90_tst", 0, 1000),
        Kernel("flash_bwd", 1500, 2000),
        Kernel("flash_bwd", 1600, 3000),
        Kernel("triton_poi_fused_silu", 3000, 4000),
    ]
    text = kernel_table(kernels)
    assert "4.0 ms from the first kernel to the last" in text
    rows = [line.split(maxsplit=3) for line in text.splitlines()]
    kinds = {row[3]: (row[0], row[2]) for row in rows[1:5]}
    assert kinds == {
        "attention": ("1.90", "47.5%"),
        "matrix products": ("1.00", "25.0%"),
        "SwiGLU": ("1.00", "25.0%"),
        "nothing runs": ("0.50", "12.5%"),
    }
    assert ["1.90", "47.5%", "2", "flash_bwd"] in rows
    assert kernel_table([]) == "no kernels\n"


def test_the_command_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine for timings may lack what exporting needs.
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in ("albor_train.ladder", "albor_train.export", "albor_serve.checkpoint.writer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    out = tmp_path / "rows.json"
    arguments = ["bench", str(write_tiny_spec(tmp_path)), "--device", "cpu", "--steps", "1"]
    assert main([*arguments, "--variants", "plain", "ours", "--json", str(out)]) == 0
    assert "| ours |" in capsys.readouterr().out
    assert [row["variant"] for row in json.loads(out.read_text())["rows"]] == ["plain", "ours"]
