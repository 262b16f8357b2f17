from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from albor_train.artefact import Artefact
from albor_train.cli import main
from albor_train.errors import TrainingError
from albor_train.ladder import prepare
from albor_train.optim import orthogonalize
from albor_train.runs import read_log
from albor_train.spec import load_spec
from albor_train.world import World, proportional_shares
from tests.train.fixtures_train import tiny_spec_dict, write_tiny_spec

ROOT = Path(__file__).parents[2]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 200))
def test_shares_add_up_and_follow_speed(speeds: list[float], extra: int) -> None:
    total = len(speeds) + extra
    shares = proportional_shares(total, speeds)
    assert sum(shares) == total
    assert min(shares) >= 1
    for a, fast in zip(shares, speeds, strict=True):
        for b, slow in zip(shares, speeds, strict=True):
            assert fast <= slow or a >= b


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_rows_are_divided_over_processes_and_come_together(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process's part, also where they don't come out even; the exchange itself is real in
    the test of two processes."""
    stack = torch.randn(rows, 4, 6, generator=torch.Generator().manual_seed(rows))
    expected = orthogonalize(stack)
    parts: dict[int, torch.Tensor] = {}

    def exchange(every: list[torch.Tensor], mine: torch.Tensor) -> None:
        parts[len(parts)] = mine
        for number, part in enumerate(every):
            part.copy_(parts.get(number, torch.zeros_like(part)))

    monkeypatch.setattr("torch.distributed.all_gather", exchange)
    for rank in range(3):
        out = World(rank, 3, torch.device("cpu")).over_rows(orthogonalize, stack)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert len(parts) == 3
    alone = World(0, 1, torch.device("cpu")).over_rows(orthogonalize, stack)
    assert torch.equal(alone, expected)


def test_shares_of_unequal_devices() -> None:
    assert proportional_shares(12, [3.0, 1.0]) == [9, 3] or proportional_shares(12, [3.0, 1.0]) == [
        8,
        4,
    ]
    with pytest.raises(TrainingError, match="lower"):
        proportional_shares(1, [1.0, 1.0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_training(
    folder: Path, tokens: Artefact, out: Path, processes: int, launcher: str = ""
) -> None:
    """Train in this process, or in several, started as torchrun does it or by torchrun itself."""
    train = ["train", str(folder / "spec.yaml"), "--work", str(folder / "work"), "--jobs", "1"]
    train += ["--tokens", str(tokens.folder), "--out", str(out), "--device", "cpu"]
    if processes == 1:
        assert main(train) == 0
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    module = ["-m", "albor_train", *train]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        commands = [([*torchrun, *module], environment)]
    else:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(processes)}
        commands = [
            (module, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=variables,
            cwd=ROOT,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for command, variables in commands
    ]
    try:
        for process in running:
            _, error = process.communicate(timeout=200)
            assert process.returncode == 0, error[-2000:]
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("launcher", ["", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(tmp_path: Path, launcher: str) -> None:
    """Real processes over gloo; the trainer itself refuses to save if their weights differ."""
    raw = copy.deepcopy(tiny_spec_dict())
    raw["train"].update(steps=8, warmup_steps=1, checkpoint_every=8)  # type: ignore[attr-defined]
    spec = load_spec(write_tiny_spec(tmp_path, raw))
    _, tokens = prepare(spec, tmp_path / "work")
    for processes in (1, 2):
        run_training(tmp_path, tokens, tmp_path / f"run{processes}", processes, launcher)
    one, two = (
        load_file(tmp_path / f"run{n}/checkpoints/step-000008/model.safetensors") for n in (1, 2)
    )
    for name, tensor in one.items():
        assert float((tensor - two[name]).abs().max()) < 1e-4, name
    losses = [
        [line["loss"] for line in read_log(tmp_path / f"run{n}/log.jsonl") if "loss" in line]
        for n in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
