"""Fuzz targets in Python: what reads lococo.json, engines.json, the files of fusion heads, and a server's requests.

A target takes bytes. It may raise nothing but LococoError, which it catches: anything else is a finding, and so is a
document that is accepted although it does not survive being written and read again. `python targets.py NAME
[libFuzzer options] [FOLDER...]` runs one under atheris, from its corpus on; the tests use `mutations` of the corpus.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
import random
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
MANIFEST = HERE.parent / "tests/data/lococo.json"
if __name__ == "__main__":
    import atheris

    packages = ["lococo_runtime", "lococo_export", "lococo_engines", "lococo_server", "json", "h11"]
    guard: Any = atheris.instrument_imports(include=packages)
else:
    guard = contextlib.nullcontext()
with guard:
    import h11
    from lococo_engines.metadata import Engines
    from lococo_runtime import LLM, LococoError
    from lococo_runtime.bundle import Manifest, read_manifest
    from lococo_server import Limits, create_app
    from lococo_server.connection import Connection
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from uvicorn import Config
    from uvicorn.server import ServerState

    from lococo_export import export_bundle
    from lococo_export.checkpoints import HEADS_CONFIG_NAME, HEADS_NAME, load_checkpoint

# a model of one layer: (name, shape) of its tensors, which are all zero
MODEL = {
    "model_type": "llama",
    "vocab_size": 3,
    "hidden_size": 4,
    "intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "tie_word_embeddings": True,
}
LAYER = {
    "input_layernorm": [4],
    "post_attention_layernorm": [4],
    "self_attn.q_proj": [4, 4],
    "self_attn.k_proj": [2, 4],
    "self_attn.v_proj": [2, 4],
    "self_attn.o_proj": [4, 4],
    "mlp.gate_proj": [2, 4],
    "mlp.up_proj": [2, 4],
    "mlp.down_proj": [4, 2],
}
SHAPES = {"model.embed_tokens.weight": [3, 4], "model.norm.weight": [4]} | {
    f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()
}


def safetensors_bytes(header: bytes, data: bytes) -> bytes:
    """The file format: the header's length, the header, the data."""
    return struct.pack("<Q", len(header)) + header + data


def zeros(shapes: dict[str, list[int]]) -> bytes:
    """A file of tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return safetensors_bytes(json.dumps(header).encode(), bytes(end))


@functools.cache
def directory() -> Path:
    """A folder that goes with the process, with the model in `model/` and an empty `bundle/`."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk takes milliseconds to replace a file
    made = tempfile.TemporaryDirectory(prefix="lococo-fuzz-", dir=memory)
    root = Path(made.name)
    directory.keep = made  # type: ignore[attr-defined]
    (root / "bundle").mkdir()
    (root / "model").mkdir()
    (root / "model/config.json").write_text(json.dumps(MODEL))
    (root / "model/model.safetensors").write_bytes(zeros(SHAPES))
    return root


def heads(data: bytes) -> bool:
    """Three parts with 0 bytes between: lococo_config.json, and header and data of lococo_heads.safetensors.

    Without a third part the second is the whole file. Returns whether it was accepted, as every target does.
    """
    config, _, rest = data.partition(b"\0")
    header, parted, tensors = rest.partition(b"\0")
    model = directory() / "model"
    (model / HEADS_CONFIG_NAME).write_bytes(config)
    (model / HEADS_NAME).write_bytes(safetensors_bytes(header, tensors) if parted and header[:1] == b"{" else rest)
    try:
        checkpoint = load_checkpoint(model)
    except LococoError:
        return False
    assert all(len(head.convs) == checkpoint.config.num_conv_layers for head in checkpoint.heads)  # noqa: S101
    return True


def model_config(data: bytes) -> bool:
    """config.json of a checkpoint."""
    root = directory() / "plain"
    root.mkdir(exist_ok=True)
    if not (root / "model.safetensors").exists():
        (root / "model.safetensors").symlink_to(directory() / "model/model.safetensors")
    (root / "config.json").write_bytes(data)
    try:
        load_checkpoint(root, policy="h2o", mem_size=4)
    except LococoError:
        return False
    return True


def python_manifest(data: bytes) -> bool:
    """lococo.json as Python reads it. "BUNDLE_ID" in it stands for the right one, once that can be computed."""
    path = directory() / "bundle/lococo.json"
    path.write_bytes(data)
    try:
        if b"BUNDLE_ID" in data:
            path.write_bytes(data.replace(b"BUNDLE_ID", bundle_id(data).encode()))
        manifest = read_manifest(path.parent)
        assert Manifest.from_json(manifest.to_json()) == manifest  # noqa: S101
        sum(t.nbytes for g in manifest.graphs for t in (*g.inputs, *g.outputs))
    except LococoError:
        return False
    return True


def bundle_id(data: bytes) -> str:
    """What from_json compares with."""
    ids = []

    class Recorder(Manifest):
        @property
        def bundle_id(self) -> str:
            ids.append(super().bundle_id)
            return ids[-1]

    with contextlib.suppress(LococoError):
        Recorder.from_json(data.decode("utf-8", "replace"))
    return ids[0] if ids else ""


def python_engines(data: bytes) -> bool:
    """engines.json as Python reads it."""
    try:
        engines = Engines.from_json(data.decode("utf-8", "replace"))
        assert Engines.from_json(engines.to_json()) == engines  # noqa: S101
    except LococoError:
        return False
    return True


def make_served_bundle(bundle: Path) -> None:
    """A model of zeros that reads bytes and has a chat template."""
    model = directory() / "bytes"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 260}))
    (model / "model.safetensors").write_bytes(zeros({**SHAPES, "model.embed_tokens.weight": [260, 4]}))
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(model / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    export_bundle(load_checkpoint(model, policy="h2o", mem_size=4, block_size=4), bundle)


class Server:
    """lococo-serve without sockets."""

    def __init__(self) -> None:
        bundle = directory() / "served"
        make_served_bundle(bundle)
        limits = Limits(sessions=1, new_tokens=2, prompt_tokens=50, queue=8, keep=2)
        self.app = create_app(LLM(bundle), limits=limits, model_name="m", allowed_hosts=["h"])
        self.loop = asyncio.new_event_loop()
        self.config = Config(self.app, log_config=None, lifespan="off", ws="none")
        self.config.load()
        logging.disable()


@functools.cache
def server() -> Server:
    """One for all inputs, as they come to one server in life."""
    return Server()


def http_body(data: bytes) -> bool:
    """The body of a request, sent to both paths that take one. Whatever it is, the answer is JSON or events."""

    async def ask(path: str) -> tuple[int, bytes]:
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"h"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        scope |= {"http_version": "1.1", "scheme": "http", "raw_path": path.encode(), "root_path": "", "state": {}}
        await asyncio.wait_for(server().app(scope, receive, send), 10)
        return sent[0]["status"], b"".join(message["body"] for message in sent[1:])

    accepted = False
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, body = server().loop.run_until_complete(ask(path))
        assert status < 500, (status, body)  # noqa: S101
        events = body.removeprefix(b"data: ").removesuffix(b"\n\n").split(b"\n\ndata: ")
        accepted |= status == 200
        answers = [json.loads(event) for event in events if event != b"[DONE]"]
        for answer in answers:
            assert ("choices" in answer) != ("error" in answer), answer  # noqa: S101
    return accepted


class Wire(asyncio.Transport):
    """What a connection writes to."""

    def __init__(self) -> None:
        super().__init__({"socket": mock.Mock(getsockopt=lambda *_: b"\x08")})  # CLOSE_WAIT: the client reads on
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


def http_connection(data: bytes) -> bool:
    """What comes over a connection, in two pieces, and its end; the first byte says where the second piece begins."""

    async def connect() -> bytes:
        state, wire = ServerState(), Wire()
        connection = Connection(head_seconds=10, most=1, config=server().config, server_state=state, app_state={})
        connection.connection_made(wire)
        cut = 1 + (data[0] if data else 0)
        for piece in (data[1:cut], data[cut:]):
            if piece and not wire.closed:
                connection.data_received(piece)
            await asyncio.sleep(0)
        if not wire.closed and not connection.eof_received():
            wire.close()
        while state.tasks:  # it is all there: it must be answered
            await asyncio.wait_for(asyncio.gather(*state.tasks), 10)
        connection.connection_lost(None)
        return wire.written

    written = server().loop.run_until_complete(connect())
    client = h11.Connection(h11.CLIENT)
    statuses = re.findall(rb"^HTTP/1.1 (\d+) ", written, re.MULTILINE)
    assert all(status < b"500" or status == b"501" for status in statuses), written  # noqa: S101
    assert client.receive_data(written) is None  # noqa: S101
    return b"200" in statuses


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "heads": heads,
    "model_config": model_config,
    "python_manifest": python_manifest,
    "python_engines": python_engines,
    "http_body": http_body,
    "http_connection": http_connection,
}


def corpus(name: str) -> dict[str, bytes]:
    """The committed inputs of a target, the manifest of the C tests among them."""
    folder = HERE / "corpus" / name
    inputs = {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}
    if name == "python_manifest":
        data = MANIFEST.read_bytes()
        inputs["lococo.json"] = data.replace(json.loads(data)["bundle_id"].encode(), b"BUNDLE_ID")
    return inputs


def mutations(inputs: list[bytes], count: int, seed: int = 1) -> Iterator[bytes]:
    """Inputs with one to four small damages each, the same for the same seed."""
    draw = random.Random(seed)
    pieces = [b"-1", b"1e999", b"NaN", b"null", b"[]", b'""', b"true", b"[" * 3000, b"9" * 5000, b'"\\ud800"', b"\xff"]
    for i in range(count):
        data = bytearray(inputs[i % len(inputs)])
        for _ in range(draw.randint(1, 4)):
            at, length = draw.randrange(len(data) + 1), draw.randint(1, 32)
            kind = draw.randrange(6)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[at : at + length]
            elif kind == 2:
                data[at:at] = data[at : at + length]
            elif kind == 3:
                data[at : at + draw.randint(0, 8)] = draw.choice(pieces)
            elif kind == 4:
                other = draw.choice(inputs)
                start = draw.randrange(len(other) + 1)
                data[at : at + length] = other[start : start + length]
            else:  # a JSON value
                start = data.find(b":", at) + 1
                end = min((e for e in (data.find(b",", start), data.find(b"}", start)) if e >= 0), default=len(data))
                data[start:end] = draw.choice(pieces)
        yield bytes(data)


if __name__ == "__main__":
    name = sys.argv.pop(1)
    target = TARGETS[name]
    seeds = directory() / "seeds"
    seeds.mkdir()
    for file, content in corpus(name).items():
        (seeds / file).write_bytes(content)

    def run(data: bytes) -> None:
        target(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:  # what knows nothing of JSON rarely leaves it whole
            return next(mutations([data], 1, seed))[:max_size]
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated

    atheris.Setup([*sys.argv, str(seeds)], run, custom_mutator=mutate)
    atheris.Fuzz()
