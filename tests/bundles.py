"""Bundles that several tests share, by name. A test that runs on the CPU exports them when it first needs them;
scripts/gpu_bundles.py exports all, and scripts/gpu_host builds their engines.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conftest import GOLDEN_NAMES, unpack_golden
from lococo_runtime.bundle import LococoConfig
from tiny_models import make_model, random_heads, small_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lococo_export import export_bundle, load_checkpoint
from lococo_export.checkpoints import save_heads

VOCAB = 96
SESSION = LococoConfig(mem_size=24, keep=12, block_size=40, local_len=2, kernel_size=5, buffer=16)
ACCUMULATED = dataclasses.replace(SESSION, buffer=7, score_decay=1.0)  # a window of greedy decoding is short
WIDE = {"vocab_size": 60000, "hidden_size": 512, "num_hidden_layers": 1, "eos_token_id": None}  # 240 MB of weights
BATCH = 3
BATCHED: dict[str, tuple[str, dict[str, Any], LococoConfig]] = {
    "lococo-gqa": ("llama", {}, small_cache()),
    "lococo-accumulated-scores": ("qwen3", {}, small_cache(score_decay=1.0, num_conv_layers=2)),
    "lococo-mha-no-buffer": ("llama", {"num_key_value_heads": 4}, small_cache(buffer=0)),
    "h2o-mqa": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, LococoConfig.h2o(12, 8, buffer=4)),
    "h2o-biases": ("qwen2", {}, LococoConfig.h2o(16, 20)),
}

EOS = 257  # of the bundles with text: the second special token
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def export_tiny(
    target: Path,
    cache: LococoConfig,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    batch: int = 1,
    **changes: Any,
) -> Path:
    """A bundle of a random model; of policy lococo with random heads."""
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch), cache, family, seed=seed, **changes)
        if cache.policy == "lococo":
            checkpoint = load_checkpoint(scratch)
        else:
            sizes = {name: getattr(cache, name) for name in ("mem_size", "block_size", "buffer")}
            checkpoint = load_checkpoint(scratch, policy="h2o", **sizes)
        assert checkpoint.config == cache
        export_bundle(checkpoint, target, dtype=dtype, batch=batch)
    return target


def make_checkpoint(path: Path, cache: LococoConfig, family: str = "llama", *, seed: int = 0, **changes: Any) -> None:
    """A random model; with random heads if the policy is lococo."""
    path.mkdir(parents=True, exist_ok=True)
    make_model(path, family, seed=seed, **changes)
    if cache.policy == "lococo":
        add_random_heads(path, cache)


def add_random_heads(path: Path, cache: LococoConfig) -> None:
    """To the model at `path`."""
    geometry = load_checkpoint(path, policy="h2o", mem_size=cache.mem_size).geometry
    heads = random_heads(geometry, cache)  # a normalizer above 1 would overflow float16 after many fusions
    save_heads(path, cache, tuple(dataclasses.replace(h, normalizer=min(h.normalizer, 0.9)) for h in heads))


def export_golden(name: str, target: Path, **options: Any) -> Path:
    """The bundle of a golden case, in float32 unless told otherwise."""
    with tempfile.TemporaryDirectory() as scratch:
        case = unpack_golden(name, Path(scratch) / name)
        export_bundle(load_checkpoint(case.path, **case.load_args), target, **options)
    return target


def byte_tokenizer(*special: str) -> Tokenizer:
    """One token a byte, 256 in all, then the special ones: a character outside ASCII takes several."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def export_text(
    target: Path, *, vocab_size: int = 260, eos_token_id: int | None = EOS, template: str = CHATML, batch: int = 1
) -> Path:
    """A random model over bytes, with a chat template; it never stops by itself before it is told to."""
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch)
        make_model(model, vocab_size=vocab_size, eos_token_id=eos_token_id, bos_token_id=None)
        byte_tokenizer("<|im_start|>", "<|im_end|>").save(str(model / "tokenizer.json"))
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        export_bundle(load_checkpoint(model, policy="h2o", mem_size=24, block_size=16), target, batch=batch)
    return target


EXPORTS: dict[str, Callable[[Path], Path]] = {
    **{name: partial(export_golden, name) for name in GOLDEN_NAMES},
    "own_kernels": partial(export_golden, GOLDEN_NAMES[0]),  # for engines of TensorRT's own kernels
    "accumulated": partial(export_tiny, cache=ACCUMULATED),
    "accumulated_fp16": partial(export_tiny, cache=ACCUMULATED, dtype="float16"),
    "aging": partial(export_tiny, cache=dataclasses.replace(ACCUMULATED, score_decay=0.9, decay_per="token")),
    "wide": partial(export_tiny, cache=LococoConfig(32, 16, 32), **WIDE),
    "session": partial(export_tiny, cache=SESSION),
    "session-accumulated": partial(export_tiny, cache=dataclasses.replace(SESSION, score_decay=1.0)),
    "stranger": partial(export_tiny, cache=SESSION, seed=1),  # the shapes of "session", other weights
    **{f"batch-{name}": partial(export_tiny, family=family, cache=cache, batch=BATCH, **changes)
       for name, (family, changes, cache) in BATCHED.items()},
    "sampling": partial(export_tiny, cache=LococoConfig.h2o(16, 16)),
    "text": export_text,
    "text-batch": partial(export_text, batch=8),
    # 30 rows of logits without a token
    "grammar": partial(export_text, vocab_size=288, template="{% for m in messages %}{{ m.content }}{% endfor %}"),
}  # fmt: skip
"""Name -> function that exports the bundle to a path."""
