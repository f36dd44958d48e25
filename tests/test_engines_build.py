"""lococo-build, with TensorRT for RTX building ahead of time on the CPU."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import export_golden
from conftest import unpack_golden
from lococo_engines import check_engines, list_engines, read_engines
from lococo_engines.build import Target, _check_tensors, _copy_of, _timing_cache_file, _Work, build_engines, choose
from lococo_engines.cli import main
from lococo_engines.gpu import Device
from lococo_engines.onnx_prepare import PreparedGraph
from lococo_engines.progress import make_monitor
from lococo_engines.toolkit import Toolkit
from lococo_runtime import BackendError, CorruptError, NoSpaceError, StorageError, TargetExistsError, VersionError
from lococo_runtime.bundle import TensorSpec, read_manifest, sha256_file

from lococo_export import export_bundle, load_checkpoint

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is missing: pip install 'lococo-export[rtx]'")
pytest.importorskip("polygraphy", reason="polygraphy is missing: pip install 'lococo-export[rtx]'")

VERSION = ".".join(trt.__version__.split(".")[:3])
KEY = f"rtx-{VERSION}-sm86"
GRAPHS = ["decoder_1", "fusion_1", "decoder_32", "fusion_32", "lm_head_32"]

# what a command runs; argv: bundle, and seconds to sleep after each graph
SLOW_BUILD = """
import sys, time
from lococo_engines import build_engines, choose
def progress(step):
    print(step, flush=True)
    if ".plan: " in step:
        time.sleep(float(sys.argv[2]))
build_engines(sys.argv[1], *choose("auto", "rtx:sm86"), progress=progress)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_golden("c1_baseline", tmp_path_factory.mktemp("build") / "bundle", dtype="float16", batch=2)


@pytest.fixture
def bundle(template: Path, tmp_path: Path) -> Path:
    """A tiny fp16 bundle of one's own."""
    shutil.copytree(template, tmp_path / "bundle")
    return tmp_path / "bundle"


def files(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


def visible(bundle: Path) -> list[str]:
    return sorted(p.name for p in (bundle / "engines").glob("[!.]*"))


def test_build(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(bundle)
    assert main([str(bundle), "--target", "rtx:sm86"]) == 0
    assert {name: data for name, data in files(bundle).items() if not name.startswith("engines/")} == before
    directory = bundle / "engines" / KEY
    assert list_engines(bundle) == [directory]
    engines = check_engines(directory, flavour="tensorrt_rtx", tensorrt_version=trt.__version__, sm=86)
    manifest = read_manifest(bundle)
    assert [p.name for p in engines.plans] == GRAPHS
    assert (engines.bundle_id, engines.state_bytes) == (manifest.bundle_id, manifest.state_bytes)
    assert (engines.flavour, engines.tensorrt_version, engines.sm) == ("tensorrt_rtx", trt.__version__, (86,))
    assert engines.plan_version == trt.__version__
    assert (engines.gpu_name, engines.cuda_version, engines.l4t) == ("", "", "")
    assert engines.workspace_bytes is None
    assert engines.options.strongly_typed
    single = [graph for graph in manifest.graphs if graph.batch == 1]  # the batched one has no engine
    for graph, plan in zip(single, engines.plans, strict=True):
        assert (plan.inputs, plan.outputs) == (graph.inputs, graph.outputs)
        assert (plan.kind, plan.tokens, plan.onnx) == (graph.kind, graph.tokens, graph.file)
        assert plan.sha256 == sha256_file(directory / plan.plan)
        assert plan.nbytes == (directory / plan.plan).stat().st_size
    captured = capsys.readouterr()
    assert f"engines/{KEY}: 5 plans of " in captured.out
    assert "workspace known on the device" in captured.out
    assert "recipe rtx: ahead of time for sm86\n" in captured.err
    assert "no engine of 2 sessions" in captured.err
    assert all(f"  {name}.plan: " in captured.err for name in GRAPHS)
    assert "peak host memory" in captured.err


def test_second_builds(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same again does nothing; another one wants --force; a damaged one too."""
    arguments = [str(bundle), "--target", "rtx:sm86"]
    assert main(arguments) == 0
    directory = bundle / "engines" / KEY
    stamp = directory.stat().st_mtime_ns
    assert main(arguments) == 0
    assert "up to date" in capsys.readouterr().err
    assert main([*arguments, "--weights", "embedded"]) == 1
    assert "already exists, built with weights shared, now embedded; pass --force" in capsys.readouterr().err
    with (directory / "decoder_1.plan").open("ab") as f:
        f.write(b"x")
    assert main(arguments) == 1
    assert "already exists, but: " in capsys.readouterr().err
    assert directory.stat().st_mtime_ns == stamp
    assert main([*arguments, "--force"]) == 0
    assert read_engines(directory).options.weights == "shared"
    assert visible(bundle) == [KEY]


def test_foreign_directories_are_never_replaced(bundle: Path) -> None:
    target = bundle / "engines" / KEY
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("precious")
    with pytest.raises(TargetExistsError, match=r"has no engines\.json; refusing to replace it even with --force"):
        build_engines(bundle, *choose("auto", "rtx:sm86"), force=True)
    assert (target / "thesis.txt").read_text() == "precious"


def test_shared_weights_are_not_in_the_plans(bundle: Path) -> None:
    """Their bytes are in none, and a build with embedded weights has larger plans."""
    recipe, target = choose("auto", "rtx:sm86")
    data = (bundle / "model.onnx.data").read_bytes()
    shared = read_engines(build_engines(bundle, recipe, target))
    plans = {p.plan: (bundle / "engines" / KEY / p.plan).read_bytes() for p in shared.plans}
    embedded = read_engines(build_engines(bundle, recipe.replace(weights="embedded"), target, force=True))
    assert embedded.weights_span == (0, 0)
    offset, nbytes = shared.weights_span
    assert offset % 4096 == 0
    for small, large in zip(shared.plans, embedded.plans, strict=True):
        left_out = sum(w.nbytes for w in small.weights)
        assert large.constant_bytes - small.constant_bytes == left_out
        assert (large.nbytes > small.nbytes) == (left_out > 0)
        assert not any(data[w.offset : w.offset + 64] in plans[small.plan] for w in small.weights)
        assert all(offset <= w.offset and w.offset + w.nbytes <= offset + nbytes for w in small.weights)
    assert sum(w.nbytes for w in shared.plans[0].weights) <= nbytes  # the widest user of the one copy


def test_fewer_layers(bundle: Path) -> None:
    directory = build_engines(bundle, *choose("auto", "rtx:sm86"), num_layers=1)
    assert directory.name == f"{KEY}-1layers"
    engines = read_engines(directory)
    assert engines.options.num_layers == 1
    assert [t.name for t in engines.plans[1].outputs] == ["present.0.key", "present.0.value"]


def test_widths(bundle: Path) -> None:
    """A recipe without the short width builds one graph less, where block_size has a short width of its own."""
    golden = unpack_golden("c1_baseline", bundle / "checkpoint")
    checkpoint = load_checkpoint(golden.path, **golden.load_args | {"block_size": 40})
    export_bundle(checkpoint, bundle / "wide")
    recipe, target = choose("auto", "rtx:sm86")
    few = recipe.replace(widths=("single", "block"))
    plans = read_engines(build_engines(bundle / "wide", few, target)).plans
    assert [p.name for p in plans] == ["decoder_1", "fusion_1", "decoder_40", "fusion_40", "lm_head_40"]


def test_a_graph_that_does_not_parse(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's reason is in the error, and nothing is left behind."""
    from lococo_engines import build

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        import dataclasses

        import onnx

        graph = prepare(*args, **kwargs)
        model = onnx.load_from_string(graph.model)
        model.graph.node[0].op_type = "Bicycle"
        return dataclasses.replace(graph, model=model.SerializeToString())

    prepare = build.prepare_graph
    monkeypatch.setattr(build, "prepare_graph", spoilt)
    with pytest.raises(BackendError, match=r"decoder_1\.onnx: TensorRT .* does not parse it: .*Bicycle"):
        build_engines(bundle, *choose("auto", "rtx:sm86"))
    assert visible(bundle) == []
    assert not [p for p in (bundle / "engines").iterdir() if p.is_dir()]


def test_a_graph_that_does_not_build(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _Work._config

    def tight(self: Any, builder: Any, network: Any, monitor: Any) -> Any:
        made = config(self, builder, network, monitor)
        made.set_flag(trt.BuilderFlag.SAFETY_SCOPE)  # which it does not offer
        made.engine_capability = trt.EngineCapability.DLA_STANDALONE
        return made

    monkeypatch.setattr(_Work, "_config", tight)
    with pytest.raises(BackendError, match=r"decoder_1: TensorRT .* does not build it: "):
        build_engines(bundle, *choose("auto", "rtx:sm86"))
    assert visible(bundle) == []


def test_damaged_weights(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.onnx\.data: expected"):
        build_engines(bundle, *choose("auto", "rtx:sm86"))
    assert visible(bundle) == []


def test_header_of_the_next_version(bundle: Path) -> None:
    directory = build_engines(bundle, *choose("auto", "rtx:sm86"))
    plan = directory / "fusion_1.plan"
    data = bytearray(plan.read_bytes())
    data[25] += 1
    plan.write_bytes(data)
    with pytest.raises(VersionError, match="expected the header of TensorRT"):
        check_engines(directory, flavour="tensorrt_rtx", tensorrt_version=trt.__version__, sm=86)


class FakeEngine:
    """An engine as TensorRT 8.6 reports it; what it cannot be asked on the CPU."""

    num_io_tensors = 2
    device_memory_size = 512

    def get_tensor_name(self, i: int) -> str:
        return ("x", "y")[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, 3)

    def get_tensor_dtype(self, name: str) -> Any:
        return {"x": trt.float16, "y": trt.int32}[name]


@pytest.mark.parametrize(("extra", "workspace"), [({}, 512), ({"device_memory_size_v2": 1024}, 1024)])
def test_tensors_and_workspace_are_the_engines_own(extra: dict[str, int], workspace: int) -> None:
    engine = type("Engine", (FakeEngine,), extra)()
    answers: list[Any] = [engine, None]
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: answers.pop(0))
    module = SimpleNamespace(Runtime=lambda log: runtime, __version__="8.6.0")
    kit = Toolkit("tensorrt", module, None, SimpleNamespace(summary=lambda: "no reason"))
    target = Target((90,), Device(0, "NVIDIA H100", 90, "13.0", 2**36))
    nothing: Any = None
    work = _Work(Path(), nothing, kit, nothing, target, None)
    tensors, found = work._inspect(None, b"", Path("decoder_1.onnx"))
    assert tensors == {"x": TensorSpec("x", (1, 3), "float16"), "y": TensorSpec("y", (1, 3), "int32")}
    assert found == workspace
    with pytest.raises(BackendError, match=r"decoder_1\.onnx: TensorRT 8\.6\.0 does not load its own plan: no reason"):
        work._inspect(None, b"", Path("decoder_1.onnx"))


def test_a_plan_with_other_tensors_is_refused() -> None:
    graph = PreparedGraph(b"", (TensorSpec("ids", (1,), "int64"),), (), (), 0)
    found = {"ids": TensorSpec("ids", (1,), "int32")}
    with pytest.raises(
        BackendError, match=r"decoder_1\.onnx: the plan's inputs .*ids: expected .*int64.*, got .*int32"
    ):
        _check_tensors(graph, found, Path("decoder_1.onnx"))


# --- the disk and other processes -------------------------------------------------------------------------------------


def test_full_disk(bundle: Path, tmp_path: Path) -> None:
    """A real one, of 4 MB."""
    mount = tmp_path / "small"
    mount.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", mount], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.skip(f"mounting a small tmpfs needs root: {result.stderr.strip()}")
    try:
        shutil.copytree(bundle, mount / "bundle")
        with pytest.raises(NoSpaceError, match="no space left on the disk"):
            build_engines(mount / "bundle", *choose("auto", "rtx:sm86"))
        assert visible(mount / "bundle") == []
        assert not [p for p in (mount / "bundle" / "engines").iterdir() if p.is_dir()]
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def test_read_only_bundle(bundle: Path, tmp_path: Path) -> None:
    mount = tmp_path / "frozen"
    mount.mkdir()
    result = subprocess.run(["mount", "--bind", bundle, mount], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"a read-only mount needs root: {result.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True)
        with pytest.raises(StorageError, match="Read-only file system; check that the target is writable"):
            build_engines(mount, *choose("auto", "rtx:sm86"))
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def test_unwritable_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default one is done without, and said so; one that was asked for is an error."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kit: Any = SimpleNamespace(flavour="tensorrt", version="8.6.0")
    target = Target((90,), Device(0, "NVIDIA H100", 90, "13.0", 2**36))
    notes: list[str] = []
    assert _timing_cache_file(None, kit, target, notes.append) is None
    assert notes == [
        f"note: {tmp_path}/file/lococo/timing-8.6.0-sm90-nvidia-h100.cache: Not a directory; building without a timing"
        " cache, so the next build is as slow"
    ]
    with pytest.raises(StorageError, match="Not a directory; check that the target is writable"):
        _timing_cache_file(tmp_path / "file" / "mine" / "x.cache", kit, target, notes.append)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", classmethod(no_home))
        assert _timing_cache_file(None, kit, target, notes.append) is None
    assert "this user has no home: set XDG_CACHE_HOME; building without a timing cache" in notes[-1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    found = _timing_cache_file(None, kit, target, notes.append)
    assert found == tmp_path / "caches" / "lococo" / "timing-8.6.0-sm90-nvidia-h100.cache"
    assert not found.exists()  # an empty file is no timing cache


def test_a_timing_cache_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT writes a copy; the cache itself is never half-written."""
    cache = tmp_path / "mine.cache"
    cache.write_bytes(b"old")
    (tmp_path / "link").symlink_to(cache)
    notes: list[str] = []
    for build, given, expected in ((b"old and new", cache, b"old and new"), (b"newer", tmp_path / "link", b"newer")):
        with _copy_of(given, tmp_path, notes.append) as copy:
            assert copy is not None
            before = Path(copy).read_bytes()
            assert before == cache.read_bytes()
            Path(copy).write_bytes(build)
            assert cache.read_bytes() == before
        assert cache.read_bytes() == expected
    with contextlib.suppress(KeyboardInterrupt), _copy_of(cache, tmp_path, notes.append) as copy:
        assert copy is not None
        Path(copy).write_bytes(b"half")
        raise KeyboardInterrupt
    assert notes == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with _copy_of(cache, tmp_path, notes.append) as copy:
        assert copy is not None
        Path(copy).write_bytes(b"newest")
        monkeypatch.setattr(shutil, "copyfile", full)
    (note,) = notes
    assert note.startswith(f"note: {cache}: no space left on the disk")
    assert note.endswith("the timing cache stays as it was")
    assert cache.read_bytes() == b"newer"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "mine.cache"]
    with _copy_of(None, tmp_path, notes.append) as copy:
        assert copy is None


def start(bundle: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, bundle, str(seconds)], stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_concurrent_builds_wait(bundle: Path) -> None:
    with start(bundle, 0.3) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "checksums\n"  # it has the lock
        with start(bundle, 0) as second:
            output, _ = second.communicate(timeout=120)
            assert first.wait(timeout=120) == 0
    assert second.returncode == 0
    assert output.splitlines() == [
        f"{KEY}: another lococo-build is at work on it; waiting",
        f"{KEY}: up to date; --force builds it again",
    ]
    assert visible(bundle) == [KEY]


def test_kill_leaves_nothing_half_made(bundle: Path) -> None:
    with start(bundle, 60) as build:
        assert build.stdout is not None
        while ".plan: " not in build.stdout.readline():
            pass
        os.kill(build.pid, signal.SIGKILL)
        assert build.wait(timeout=60) == -signal.SIGKILL
    assert visible(bundle) == []
    assert list_engines(bundle) == []
    stale = [p for p in (bundle / "engines").iterdir() if p.is_dir()]
    assert len(stale) == 1
    began = time.monotonic()
    build_engines(bundle, *choose("auto", "rtx:sm86"))
    assert time.monotonic() - began < 60  # the lock died with its holder
    assert visible(bundle) == [KEY]
    assert not stale[0].exists()


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self, interrupt: bool = False) -> None:
        self.text, self.interrupt = "", interrupt

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.interrupt:
            raise KeyboardInterrupt
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_bar(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal: Any = Terminal()
    monkeypatch.setattr("lococo_engines.build.make_monitor", lambda trt, label: make_monitor(trt, label, terminal))
    build_engines(bundle, *choose("auto", "rtx:sm86"))
    lines = terminal.text.split("\r\x1b[K")
    assert any(line.startswith("  fusion_32 [") for line in lines)
    assert lines[-1] == ""


def test_ctrl_c_cancels(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal: Any = Terminal(interrupt=True)
    monkeypatch.setattr("lococo_engines.build.make_monitor", lambda trt, label: make_monitor(trt, label, terminal))
    assert main([str(bundle), "--target", "rtx:sm86"]) == 130
    assert visible(bundle) == []


def test_no_bar_without_a_terminal_or_monitor() -> None:
    terminal: Any = Terminal()
    assert make_monitor(SimpleNamespace(), "x", terminal) is None
    with open(os.devnull, "w") as stream:
        assert make_monitor(trt, "x", stream) is None
