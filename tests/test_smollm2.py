"""SmolLM2-135M-Instruct: a real model on real text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lococo_runtime import Model, SamplingParams, Session, generate_many
from lococo_runtime.llm import load_tokenizer

from lococo_export import export_bundle, load_checkpoint

ROOT = Path(__file__).parents[1]
MODEL = Path(os.environ.get("LOCOCO_SMOLLM2", ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"))
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL} is missing: run scripts/fetch_smollm2.py"),
]

PROMPT = "Once upon a time, in a village by the sea, there lived an old clockmaker who"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2") / "bundle"
    export_bundle(load_checkpoint(MODEL, policy="h2o", mem_size=256, block_size=256), target, batch=4)
    return target


def test_greedy_tokens_are_those_of_transformers(bundle: Path) -> None:
    """220 tokens in a context that fits the cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=220, min_new_tokens=220,
            do_sample=False,
        )  # fmt: skip
    expected = out[0, len(ids) :].tolist()
    eos = set(load_checkpoint(MODEL, policy="h2o").geometry.eos_token_ids)
    with Session(bundle) as session:
        logits = session.prefill(ids)
        for token in expected:
            # transformers was told to go on past the end of sequence
            logits[list(eos)] = -np.inf
            assert int(logits.argmax()) == token
            logits = session.step(token)


def test_memory_and_state_do_not_grow(bundle: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 40_000, 3_000)
    with Session(bundle) as session:
        size = len(session.state())
        for first in range(0, 3_000, 256):
            session.prefill(ids[first : first + 256])
            assert session.live_slots <= session.model.manifest.cache.capacity
        assert len(session.state()) == size
        assert len(list(session.generate([], SamplingParams(max_tokens=5, ignore_eos=True)))) == 5


def test_batched_sessions_write_what_each_writes_alone(bundle: Path) -> None:
    """Four of different lengths, fused before and while they write."""
    text = load_tokenizer(bundle).encode(PROMPT).ids * 30
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with Model(bundle) as model, model.session() as alone:
        prompts = [text[i : i + length] for i, length in enumerate((6, 264, 268, 400))]
        outputs = generate_many(model, prompts, params)
        for prompt, output in zip(prompts, outputs, strict=True):
            alone.reset()
            assert output.token_ids == list(alone.generate(prompt, params))
            assert len(prompt) < 256 or alone.counters["fusions"] > 0


def test_export_memory_stays_near_the_weights(tmp_path: Path) -> None:
    """Peak resident memory of lococo-export, in a process of its own, against 2.2 times the weights."""
    target = tmp_path / "bundle"
    script = (
        "import sys; from lococo_export.cli import export_main; from lococo_runtime._process import memory_bytes;"
        f"code = export_main(['--model', {str(MODEL)!r}, '--policy', 'h2o', '-o', {str(target)!r}]);"
        "print('PEAK', memory_bytes('VmHWM')); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split("PEAK")[1])
    assert peak < 2.2 * (target / "model.onnx.data").stat().st_size
