"""lm-evaluation-harness scores a small task through the server, and the reference agrees.

lm-eval wants many packages, so it lives in an environment of its own:

    python -m venv ENV && ENV/bin/pip install "lm-eval[api]" transformers
    ALBOR_LM_EVAL=ENV/bin/lm_eval python -m pytest -m slow tests/api/test_lm_eval.py -s
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from albor_serve.api.completion import ServedModel
from albor_serve.backends.base import ExtendStep
from albor_serve.backends.llamacpp import LlamaCppBackend
from albor_serve.backends.torch_ref import TorchReferenceBackend
from albor_serve.checkpoint import open_checkpoint
from albor_serve.config import EngineConfig
from albor_serve.loader import LoadOptions, embedded_path, load_model
from albor_serve.sampler import log_softmax
from tests.api.live import Live, serving, serving_backend
from tests.fixtures_tiny import QWEN2_PATTERN, save_gguf

PROGRAM = os.environ.get("ALBOR_LM_EVAL", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PROGRAM, reason="ALBOR_LM_EVAL names no lm_eval program"),
]

NUM_DOCUMENTS = 24
TASK = """\
task: albor_next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


def save_tokenizer(folder: Path) -> Tokenizer:
    """The embedded model's tokenizer as transformers reads it."""
    fields = gguf.GGUFReader(embedded_path()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(each.split(" ")) for each in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return tokenizer


def documents() -> Iterator[dict[str, object]]:
    """Code of this repository: which of four lines comes next?"""
    root = Path(__file__).parents[2] / "albor_serve"
    lines = {file: file.read_text(encoding="utf-8").splitlines(True) for file in root.glob("*.py")}
    files = sorted(file for file in lines if len(lines[file]) > 50)
    for at in range(NUM_DOCUMENTS):
        text = lines[files[at % len(files)]]
        cut = 20 + at
        others = [lines[files[(at + k) % len(files)]][30] for k in (1, 2, 3)]
        choices = [each for each in (text[cut], *others) if each.strip()]
        yield {"before": "".join(text[:cut]), "choices": choices}


def run_lm_eval(live: Live, folder: Path, tokenizer: Path) -> list[dict[str, object]]:
    """The samples that lm_eval logs."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents()))
    (folder / "task.yaml").write_text(TASK.format(data=data))
    model = f"model=default,base_url={live.url}/v1/completions,tokenizer={tokenizer}"
    options = "tokenizer_backend=huggingface,num_concurrent=2,max_length=2048"
    command = [PROGRAM, "--model", "local-completions", "--model_args", f"{model},{options}"]
    command += ["--tasks", "albor_next_line", "--include_path", str(folder), "--log_samples"]
    command += ["--output_path", str(folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sys.stdout.write(done.stdout[-600:])
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def errors_of(live: Live, folder: Path) -> list[float]:
    """|log-likelihood through lm_eval - the reference's|, for every choice of every document."""
    folder.mkdir(exist_ok=True)
    tokenizer = save_tokenizer(folder / "tokenizer")
    samples = run_lm_eval(live, folder, folder / "tokenizer")
    assert len(samples) == NUM_DOCUMENTS
    checkpoint = open_checkpoint(embedded_path())
    reference = TorchReferenceBackend(checkpoint.config, checkpoint.read, 1, 2048)
    errors = []
    for sample in samples:
        document = sample["doc"]
        assert isinstance(document, dict)
        for choice, answer in zip(document["choices"], sample["filtered_resps"], strict=True):
            # lm-eval's rule: spaces at the end of the context belong to the continuation.
            before = document["before"].rstrip()
            more = document["before"][len(before) :] + choice
            ids = tokenizer.encode(before).ids
            num_before = len(ids)
            ids = ids + tokenizer.encode(before + more).ids[num_before:]
            reference.rewind(0, 0)
            (rows,) = reference.extend([ExtendStep(0, tuple(ids), "all")])
            wanted = sum(
                float(log_softmax(rows[at - 1])[ids[at]]) for at in range(num_before, len(ids))
            )
            scored = answer[0]
            value = float(ast.literal_eval(scored)) if isinstance(scored, str) else float(scored)
            errors.append(abs(value - wanted))
    reference.close()
    return errors


def test_the_reference_agrees_on_the_same_weights(tmp_path: Path) -> None:
    """Nothing rounded on the way: log-likelihoods of whole lines agree to 1e-3."""
    checkpoint = open_checkpoint(embedded_path())
    weights = {name: checkpoint.read(name) for name in checkpoint.tensor_names}
    save_tokenizer(tmp_path / "tokenizer")
    spelled = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    path = tmp_path / "f32.gguf"
    save_gguf(path, checkpoint.config, weights, tokenizer_json=spelled)
    backend = LlamaCppBackend.load(path, 2, 2048, kv_type="f32")
    config = EngineConfig(num_slots=2, max_seq_len=2048)
    with serving_backend(backend, backend.tokenizer, config) as live:
        errors = errors_of(live, tmp_path / "run")
    print(f"\nfloat32: median {np.median(errors):.1e}, largest {max(errors):.1e}")
    assert max(errors) < 1e-3


def test_the_shipped_weights_are_near(tmp_path: Path) -> None:
    """On a CPU activations are rounded to 8 bits and the cache to 16, as llama.cpp does."""
    loaded = load_model(embedded_path(), LoadOptions(num_slots=2, max_seq_len=2048))
    loaded.engine.start()
    try:
        with serving(ServedModel("albor", loaded.engine, loaded.template)) as live:
            errors = errors_of(live, tmp_path)
    finally:
        loaded.engine.close()
    print(f"\nas shipped: median {np.median(errors):.1e}, largest {max(errors):.1e}")
    assert np.median(errors) < 0.3
    assert max(errors) < 2
