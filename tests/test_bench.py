"""lococo-bench: what it measures, what it writes, and what it compares."""

from __future__ import annotations

import csv
import ctypes
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lococo_bench
import numpy as np
import pytest
import torch
from lococo_bench import Against, Bench, Plan, add_ratios, compare, format_rows, plot, read_rows
from lococo_bench import device as devices
from lococo_bench.cli import main
from lococo_bench.device import CudaDevice, open_device
from lococo_bench.measure import at_position, step_bytes, summary_ms
from lococo_runtime import (
    ConfigError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    Session,
    UnsupportedError,
    read_manifest,
)
from tiny_models import make_model

from lococo_export import export_bundle, load_checkpoint

pytest_plugins = ["pytester"]

M, BLOCK = 24, 16
LLAMA_BENCH_KEYS = {
    "build_commit", "cpu_info", "gpu_info", "model_filename", "model_type", "model_size", "model_n_params", "n_batch",
    "n_threads", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
    "samples_ns", "samples_ts",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny"
    make_model(path, eos_token_id=None)
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bench") / "bundle"
    export_bundle(load_checkpoint(checkpoint, policy="h2o", mem_size=M, block_size=BLOCK), target)
    return target


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "COPY_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def rows(bundle: Path) -> list[dict[str, Any]]:
    with Bench(bundle) as bench:
        return list(bench.run(Plan((5, 40), (20,), (0, 100, 3000, 1_000_000), 2, "position")))


# --- measuring -------------------------------------------------------------------------------------------------------


def test_rows_have_the_keys_of_llama_bench(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 4 * 3
    for row in rows:
        assert row.keys() >= LLAMA_BENCH_KEYS
        assert len(row["samples_ns"]) == 2
        assert row["avg_ns"] == pytest.approx(np.mean(row["samples_ns"]), abs=1)
        tokens = row["n_prompt"] or row["n_gen"]
        assert row["samples_ts"] == pytest.approx([1e9 * tokens / ns for ns in row["samples_ns"]])
        assert row["copy_bytes_per_second"] > 1e8


def test_every_step_is_counted_with_or_without_a_fusion(rows: list[dict[str, Any]]) -> None:
    generated = [row for row in rows if row["n_gen"]]
    for row in generated:
        plain, fusion = row["plain_step_ms"]["samples"], row["fusion_step_ms"]["samples"]
        assert plain + fusion == 2 * 20
        assert fusion in (2, 3)  # every 17th step
        assert row["window_ms_per_token"]["samples"] == 2
        assert row["bytes_per_second"] * row["plain_step_ms"]["p50"] == pytest.approx(1e3 * row["step_bytes"])


def test_a_session_is_measured_at_the_depth_it_says(bundle: Path) -> None:
    with Bench(bundle) as bench:
        for depth, by in ((7, "prefill"), (1001, "prefill"), (5000, "position")):
            state, how = bench._reach(depth, by)  # type: ignore[arg-type]
            assert how == by
            assert state is not None
            bench.session.set_state(state)
            assert bench.session.position == depth
        assert bench._reach(0, "position") == (None, "prefill")


def test_position_in_a_state_is_data(bundle: Path) -> None:
    with Session(bundle) as session:
        session.prefill(list(range(3, 90)))
        state, live = session.state(), session.live_slots
        session.set_state(at_position(state, 1 << 20))
        assert (session.position, session.live_slots) == (1 << 20, live)
        assert session.state()[96:] == state[96:]
        session.step(5)
        assert session.position == (1 << 20) + 1
        with pytest.raises(CorruptError):
            session.set_state(state[:-1] + bytes([state[-1] ^ 1]))


def test_bytes_of_a_step_are_the_weights_and_the_slots(bundle: Path) -> None:
    with Session(bundle) as session:
        m = session.model.manifest
        state = sum(t.nbytes for t in m.state if t.name.startswith("past_") and t.name != "past_length")
        weights = next(f.nbytes for f in m.files if f.path == "model.onnx.data")
        embedding = m.model.vocab_size * m.model.hidden_size * 4
        # RoPE tables, norms, and page alignment are the rest of the file
        assert 0 <= weights - embedding + state - step_bytes(m) < 0.9 * weights
        matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 96 * 32
        assert step_bytes(m) == 4 * matrices + state


def test_summary_is_in_milliseconds() -> None:
    found = summary_ms([float(x) for x in range(1, 102)])
    assert found == {"min": 1, "p50": 51, "p95": 96, "p99": 100, "mean": 51, "samples": 101}


@pytest.mark.parametrize("wrong", [{"n_prompt": (0,)}, {"n_gen": (-1,)}, {"n_depth": (2**31,)}, {"repetitions": 0}])
def test_plans_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        Plan(**wrong)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_formats_carry_the_same_numbers(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for kind in ("json", "jsonl"):
        (tmp_path / kind).write_text(format_rows(rows, kind))
        assert read_rows(tmp_path / kind) == rows
    table = list(csv.DictReader(io.StringIO(format_rows(rows, "csv"))))
    assert [int(line["avg_ns"]) for line in table] == [row["avg_ns"] for row in rows]
    assert float(table[2]["plain_step_ms.p50"]) == rows[2]["plain_step_ms"]["p50"]
    markdown = format_rows(rows, "md")
    assert "| tg20 @ d1000000 " in markdown
    assert f"{rows[2]['plain_step_ms']['p50']:.3f}" in markdown


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="lococo-bench -o json"):
        read_rows(tmp_path / "absent")
    for content in ("{}", "[1]", "hello", "[]"):
        (tmp_path / "wrong").write_text(content)
        with pytest.raises(InvalidArgumentError, match="rows of lococo-bench"):
            read_rows(tmp_path / "wrong")


def test_committed_figures_say_of_what_they_are() -> None:
    files = sorted(Path(__file__).parents[1].glob("docs/benchmarks/h100-*.json"))
    files = [path for path in files if path.read_text().startswith("[")]  # rows of this command
    assert files
    versions = {"tensorrt": "tensorrt_version", "onnxruntime": "onnxruntime_version", "torch": "torch_version"}
    for path in files:
        rows = read_rows(path)
        for row in rows:
            said = ("gpu_info", "driver_version", "cuda_version", "power_mode", "clocks", versions[row["backend"]])
            assert not [name for name in said if not row[name]], path
            assert re.fullmatch("[0-9a-f]{7,40}", row["build_commit"]), path
            assert row["samples_ns"], path
        own = [row for row in rows if row["backend"] == "tensorrt"]
        for row in own:  # the peak is what lococo-build had promised
            assert row["model_device_bytes"] + row["session_device_bytes"] <= 1.03 * row["promised_device_bytes"], path
        if own == rows:  # at every depth, and without PyTorch in the process
            assert len({row["peak_memory_bytes"] for row in own}) == 1, path


def test_plot_draws_every_implementation(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    other = [{**row, "implementation": "transformers-dynamic", "window_ms_per_token": None} for row in rows]
    plot([*rows, *other], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
    with pytest.raises(InvalidArgumentError, match=r"plot\.docx"):
        plot(rows, tmp_path / "plot.docx")
    with pytest.raises(InvalidArgumentError, match="pass -n"):
        plot([row for row in rows if row["n_prompt"]], tmp_path / "plot.svg")


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_measures_compares_and_fails(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(bundle), "-p", "0", "-n", "20", "-d", "100", "-r", "2"]
    assert main([*command, "-o", "json"]) == 0
    baseline = tmp_path / "old.json"
    baseline.write_text(capsys.readouterr().out)
    assert main([*command, "--baseline", str(baseline), "--fail-above", "1000"]) == 0
    assert "none slower" in capsys.readouterr().err

    slow = json.loads(baseline.read_text())
    slow[0]["samples_ns"] = [1, 1]
    baseline.write_text(json.dumps(slow))
    assert main([*command, "--baseline", str(baseline), "--fail-above", "1000"]) == 1
    assert "above 1000" in capsys.readouterr().err

    slow[0]["cpu_info"] = "another machine"
    baseline.write_text(json.dumps(slow))
    assert main([*command, "--baseline", str(baseline)]) == 0
    assert "SKIPPED" in capsys.readouterr().err


def test_command_refuses_before_it_measures(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, why in (
        (["--against", "torch"], "--model"),
        (["--against", "jax", "--model", "x"], "transformers-static-compile"),
        (["--baseline", "nowhere.json"], "not found"),
        (["--device", "tpu"], "cuda:0"),
        (["-n", "-3"], "n_gen"),
    ):
        assert main([str(bundle), *wrong]) == 1
        assert why in capsys.readouterr().err


# --- regression ------------------------------------------------------------------------------------------------------


def changed(rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    return [{**row, **changes} for row in rows]


def test_a_slower_median_is_named(rows: list[dict[str, Any]]) -> None:
    assert not compare(rows, rows).failed
    assert all(change.ratio == 1 for change in compare(rows, rows).changes)
    slower = json.loads(json.dumps(rows))
    slower[2]["fusion_step_ms"]["p50"] *= 1.06
    comparison = compare(rows, slower)
    assert [(c.test, c.metric) for c in comparison.failed] == [("tg20", "fusion_step_ms")]
    assert "above 1.05" in str(comparison)
    assert not compare(rows, slower, 1.07).failed
    assert not compare(slower, rows).failed


def test_other_hardware_skips_and_other_models_are_refused(rows: list[dict[str, Any]]) -> None:
    comparison = compare(changed(rows, gpu_info="NVIDIA H100"), rows, 1.0)
    assert comparison.skipped
    assert "NVIDIA H100" in str(comparison)
    with pytest.raises(InvalidArgumentError, match="mem_size"):
        compare(changed(rows, mem_size=7), rows)
    with pytest.raises(InvalidArgumentError, match=r"no test in common.*pp5"):
        compare(rows[:1], rows[1:])
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        compare(rows, rows, 0.5)


def plugin_options() -> list[str]:
    installed = any(e.name == "lococo_bench" for e in importlib.metadata.entry_points(group="pytest11"))
    return [] if installed else ["-p", "lococo_bench.pytest_plugin"]


def test_fixture_fails_skips_and_records(pytester: pytest.Pytester, bundle: Path) -> None:
    pytester.makepyfile(
        f"""
        import lococo_bench.device
        lococo_bench.device.COPY_BYTES = 1 << 20

        def test_latency(lococo_latency):
            lococo_latency({str(bundle)!r}, "base.json", n_gen=(18,), repetitions=1, num_threads=1, fail_above=1000)
        """
    )

    def run(*options: str) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*plugin_options(), "-rs", *options)

    missing = run()
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*--lococo-update-baseline*"])
    run("--lococo-update-baseline").assert_outcomes(passed=1)
    run().assert_outcomes(passed=1)
    file = pytester.path / "base.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps(changed(rows, samples_ns=[1])))
    slower = run()
    slower.assert_outcomes(failed=1)
    slower.stdout.fnmatch_lines(["*above 1000*"])
    file.write_text(json.dumps(changed(rows, cpu_info="another")))
    skipped = run()
    skipped.assert_outcomes(skipped=1)
    skipped.stdout.fnmatch_lines(["*other hardware*another*"])


def test_the_plugin_costs_other_runs_nothing() -> None:
    """pytest imports it in every run of everybody who has the package installed."""
    code = "import sys, pytest, lococo_bench.pytest_plugin; print('numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_public_names() -> None:
    assert {name for names in lococo_bench._HOMES.values() for name in names} == set(lococo_bench.__all__)
    assert all(hasattr(lococo_bench, name) for name in lococo_bench.__all__)


# --- against torch ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile that traces as always, and runs what it traced without compiling that for a minute."""

    def compile_(function: Any, *, mode: str | None = None, **options: Any) -> Any:
        assert mode in ("reduce-overhead", None)
        return original(function, backend="eager", **options)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_against_torch(
    bundle: Path, checkpoint: Path, rows: list[dict[str, Any]], tmp_path: Path, quick_compile: None
) -> None:
    said: list[str] = []
    against = Against(
        read_manifest(bundle), checkpoint, open_device("cpu", 1), rows[0], max_depth=100, progress=said.append
    )
    found = list(against.run(Plan((5,), (20,), (100, 3000), 1)))
    tests = [(row["implementation"], row["n_prompt"], row["n_depth"]) for row in found]
    decoded = [("reference-eager", 0), ("reference-compile", 0)]
    assert [t for t in tests if t[1]] == [("reference-eager", 5, 0), ("transformers-dynamic", 5, 0)]
    assert [(name, depth) for name, n, depth in tests if not n and depth == 3000] == [
        (name, 3000) for name, _ in decoded
    ]
    assert len([t for t in tests if not t[1] and t[2] == 100]) == 4
    assert sum("left out" in line for line in said) == 2
    both = [*rows, *found]
    add_ratios(both)
    for row in found:
        assert row["ratio_to_lococo"] > 0
        assert row["torch_version"]
        if row["implementation"].startswith("reference") and row["n_gen"]:
            assert row["fusion_step_ms"]["samples"] >= 1
    other = tmp_path / "other"
    make_model(other, num_hidden_layers=1, eos_token_id=None)
    with pytest.raises(ConfigError, match="geometry"):
        Against(read_manifest(bundle), other, open_device("cpu"), {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_reference_steps_are_the_reference(bundle: Path, checkpoint: Path, quick_compile: None) -> None:
    """Compiled steps in place leave the state that the reference session has."""
    from lococo_bench.against import _ReferenceSteps

    from lococo_export.reference import ReferenceModel, ReferenceSession
    from lococo_export.verify import checkpoint_of

    model = ReferenceModel(checkpoint_of(read_manifest(bundle), checkpoint))
    expected = ReferenceSession(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for compiled in (False, True):
            steps = _ReferenceSteps(torch, model, compiled)
            steps.start(0)
            expected.state, token = model.empty_state(), 0
            for _ in range(60):
                steps()
                token = int(expected.step(token).argmax())
                assert int(steps.ids) == token
            assert steps.live == expected.live_slots == int(steps.state.length)
            assert int(steps.state.position) == 60
            torch.testing.assert_close(steps.state.keys[1], expected.state.keys[1])
            torch.testing.assert_close(steps.state.logits, expected.state.logits)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # a layer, an append, a fusion


def test_without_torch_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lococo_bench.against import import_torch

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotFoundError, match=r"--against torch.*transformers.*pip install"):
        import_torch()


# --- a device that is not here ---------------------------------------------------------------------------------------


class FakeDriver:
    """libcuda with one device of 1000 MiB; a copy takes a millisecond."""

    def __init__(self) -> None:
        self.used, self.freed, self.code = 100 << 20, 0, 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *args: self.call(name, *args)

    def call(self, name: str, *args: Any) -> int:
        out = args[0]._obj if args and hasattr(args[0], "_obj") else None
        if name == "cuDeviceGetCount":
            out.value = 1
        elif name == "cuDriverGetVersion":
            out.value = 13000
        elif name == "cuMemGetInfo_v2":
            args[0]._obj.value, args[1]._obj.value = (1000 << 20) - self.used, 1000 << 20
        elif name == "cuMemAlloc_v2":
            out.value = 4096
            self.used += args[1].value
        elif name == "cuEventCreate":
            out.value = 8
        elif name == "cuEventElapsedTime":
            out.value = 1.0
        elif name == "cuMemFree_v2":
            self.freed += 1
        elif name in ("cuDeviceGetName", "cuDeviceGetPCIBusId"):
            args[0].value = b"Fake GPU" if name == "cuDeviceGetName" else b"0000:01:00.0"
        elif name == "cuGetErrorString":
            args[1]._obj.value = b"out of memory"
            return 0
        return self.code if name == "cuMemAlloc_v2" else 0


class FakeNvml:
    """pynvml on a device that knows its limit and this process, and refuses the rest."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> str:
        assert bus == b"0000:01:00.0"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=self.pid, usedGpuMemory=77 << 20)]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return 2500

    def __getattr__(self, name: str) -> Any:
        def refuse(*args: object) -> None:
            raise self.NVMLError(name)

        return refuse


def test_cuda_device_through_the_driver() -> None:
    driver = FakeDriver()
    device = CudaDevice(0, driver, FakeNvml(os.getpid()))
    driver.used += 50 << 20
    assert device.memory() == {
        "peak_memory_bytes": 77 << 20, "memory_by": "nvml-process", "device_used_bytes": 150 << 20,
    }  # fmt: skip
    about = device.describe()
    assert (about["gpu_info"], about["cuda_version"], about["power_mode"]) == ("Fake GPU", "13.0", "limit 700 W")
    assert device.energy_joules() == 2.5
    assert device.copy_bandwidth() == pytest.approx(2 * (1 << 20) / 1e-3)
    assert driver.freed == 2
    elsewhere = CudaDevice(0, driver, FakeNvml(-1))
    driver.used += 3
    assert elsewhere.memory()["peak_memory_bytes"] == 3
    assert elsewhere.memory()["memory_by"] == "device-delta"
    with pytest.raises(InvalidArgumentError, match="cuda:0 to cuda:0, got cuda:1"):
        CudaDevice(1, driver, FakeNvml(-1))
    driver.code = 2
    with pytest.raises(UnsupportedError, match="cuMemAlloc_v2: CUDA driver error 2: out of memory"):
        device.copy_bandwidth()


def test_no_driver_is_an_error_that_helps() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(UnsupportedError, match="no NVIDIA driver"):
            open_device("cuda:0")
    else:
        pytest.skip("this machine has an NVIDIA driver")
