"""Recipes, engines.json, preflight and prepared graphs: all that needs no TensorRT."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lococo_engines
import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import export_golden
from conftest import Backend, has_driver
from lococo_engines import Recipe, check_engines, choose, gpu, list_engines, load_recipe, read_engines
from lococo_engines.build import Target, build_engines, cache_directory, check_files, engines_key
from lococo_engines.cli import main
from lococo_engines.gpu import Device
from lococo_engines.kernels import (
    MAX_CONV_LAYERS,
    MAX_FUSION_LAYERS,
    KernelNetwork,
    _Numbers,
    kernel_network,
    require_shapes,
)
from lococo_engines.metadata import BuildOptions, Engines, PlanInfo, WeightInput
from lococo_engines.onnx_prepare import prepare_graph, weight_inputs
from lococo_engines.preflight import plan_version
from lococo_engines.recipe import builtin_recipes, parse_bytes, parse_recipe, recipe_for
from lococo_engines.toolkit import Toolkit
from lococo_runtime import (
    BackendError,
    ConfigError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
    VersionError,
)
from lococo_runtime.bundle import GraphSpec, TensorSpec, read_manifest, sha256_file

H100 = Device(0, "NVIDIA H100 80GB HBM3", 90, "13.0", 80 * 2**30)


@pytest.fixture(scope="module")
def bundle(cpu: Backend) -> Path:
    """A tiny fp32 bundle; read-only."""
    return cpu.bundle("c1_baseline")


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_every_recipe_is_valid_and_named_after_its_file() -> None:
    assert set(builtin_recipes()) == {"h100", "orin", "orin-nano", "thor", "rtx"}
    assert builtin_recipes()["h100"] == Recipe(
        name="h100",
        flavour="tensorrt",
        sm=(90,),
        widths=("single", "short", "block"),
        weights="shared",
        workspace_bytes=4 * 2**30,
        builder_optimization_level=3,
        kernels="lococo",
    )


@pytest.mark.parametrize(
    ("sm", "gib", "name"),
    [(90, 80, "h100"), (87, 64, "orin"), (87, 8, "orin-nano"), (110, 122, "thor"), (86, 12, "rtx"), (120, 32, "rtx")],
)
def test_auto_picks_by_compute_capability_and_memory(sm: int, gib: int, name: str) -> None:
    assert recipe_for(Device(0, "GPU", sm, "13.0", gib * 2**30)).name == name


def test_auto_refuses_a_device_without_recipe() -> None:
    with pytest.raises(UnsupportedError, match=r"no recipe for Tesla .*sm70.*h100 for sm90.*--recipe FILE\.toml"):
        recipe_for(Device(0, "Tesla V100", 70, "12.4", 2**34))


GOOD = 'flavour = "tensorrt"\nsm = [80]\nwidths = ["single", "block"]\nweights = "shared"\nworkspace = "1G"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sm = ", "not valid TOML"),
        (GOOD.replace("sm = [80]", "sm = 80"), "sm: expected a list, got 80"),
        (GOOD.replace("[80]", "[8.0]"), r"sm: expected compute capabilities such as \[87\], got \[8.0\]"),
        (GOOD.replace('"tensorrt"', '"trt"'), "flavour: expected one of tensorrt, tensorrt_rtx, got 'trt'"),
        (GOOD.replace('"block"', '"long"'), "widths: expected some of single, short, block"),
        (GOOD.replace('"single", ', ""), "widths: expected single and block in it"),
        (GOOD.replace('"1G"', '"1"'), 'workspace: expected a size with a unit, such as "512M" or "2G", got \'1\''),
        (GOOD + "colour = 1\n", "unknown: colour; missing: none"),
        (GOOD.replace('weights = "shared"\n', ""), "unknown: none; missing: weights"),
        (GOOD + "builder_optimization_level = 6\n", "builder_optimization_level: expected 0 to 5, got 6"),
        (GOOD + "version_compatible = 1\n", "version_compatible: expected a boolean, got 1"),
        (
            GOOD.replace('"tensorrt"', '"tensorrt_rtx"') + "version_compatible = true\n",
            "version_compatible: expected f",
        ),
    ],
)
def test_recipes_are_checked(text: str, message: str) -> None:
    with pytest.raises(ConfigError if "workspace" not in message else InvalidArgumentError, match=message):
        parse_recipe(text, "mine")


def test_recipes_from_files(tmp_path: Path) -> None:
    path = tmp_path / "a100.toml"
    path.write_text(GOOD)
    assert load_recipe(str(path)) == parse_recipe(GOOD, "a100")
    with pytest.raises(NotFoundError, match="expected a recipe file"):
        load_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(NotFoundError, match="expected auto, h100, orin, orin-nano, rtx, thor or a "):
        load_recipe("x")


def test_sizes() -> None:
    assert parse_bytes("512M", "x") == 512 * 2**20
    assert parse_bytes("2GiB", "x") == 2**31
    for text in ("", "2", "-1G", "0G", "2 T"):
        with pytest.raises(InvalidArgumentError, match="x: expected a size"):
            parse_bytes(text, "x")


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_target_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lococo_engines.build.query_device", lambda: H100)
    recipe, target = choose("auto", None)
    assert (recipe.name, target.sm, target.device) == ("h100", (90,), H100)
    with pytest.raises(UnsupportedError, match=r"recipe orin: expected a device of sm87, found NVIDIA H100.*sm90"):
        choose("orin", None)


def test_target_ahead_of_time() -> None:
    recipe, target = choose("auto", "rtx:sm120,sm86")
    assert (recipe.name, target.sm, target.device) == ("rtx", (86, 120), None)


@pytest.mark.parametrize(
    ("recipe", "target", "error", "message"),
    [
        ("auto", "rtx:sm90", UnsupportedError, "recipe rtx offers sm75, .*, got sm90"),
        ("auto", "trt:sm86", InvalidArgumentError, "expected such as rtx:sm86,sm89,sm120, got 'trt:sm86'"),
        ("auto", "rtx:86", InvalidArgumentError, "expected such as"),
        ("auto", "rtx:", InvalidArgumentError, "expected such as"),
        ("auto", "rtx:sm86,sm86", InvalidArgumentError, "expected such as"),
        ("h100", "rtx:sm86", InvalidArgumentError, "needs --recipe rtx"),
    ],
)
def test_wrong_targets(recipe: str, target: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose(recipe, target)


@pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver here")
def test_without_a_gpu_the_error_says_what_to_run_where(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no NVIDIA driver on this machine: libcuda.so.1: ")
    assert f"copy the bundle to that machine and run there:\n  lococo-build {bundle}\n" in error
    assert f"pip install 'lococo-export[rtx]' && lococo-build {bundle} --target rtx:sm86,sm89,sm120" in error
    assert not (bundle / "engines").exists()
    with pytest.raises(UnsupportedError, match=r"lococo-build 'my bundle'\n"):
        choose("auto", None, "my bundle")


def test_without_tensorrt_the_error_says_how_to_get_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lococo_engines.build.query_device", lambda: H100)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main([str(bundle)]) == 1
    assert "tensorrt is not usable here: " in (error := capsys.readouterr().err)
    assert "JetPack (python3-libnvinfer); elsewhere: pip install tensorrt 'lococo-export[tensorrt]'" in error


def test_wrong_arguments(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "none")], "not found; expected a bundle directory"),
        ([str(bundle), "--target", "rtx:sm86", "--mem-pool-size", "2G"], "expected workspace:N, such as workspace:2G"),
        ([str(bundle), "--target", "rtx:sm86", "--version-compatible"], "version_compatible: expected false"),
        ([str(bundle), "--recipe", "h200", "--target", "rtx:sm86"], "expected auto, h100"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


# --- the device -------------------------------------------------------------------------------------------------------


class FakeDriver:
    """libcuda as ctypes sees it."""

    def __init__(self, init: int = 0, count: int = 1) -> None:
        self.init, self.count = init, count

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuGetErrorString(self, code: int, out: Any) -> int:
        out._obj.value = b"system not yet initialized"
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self.count
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: int) -> int:
        name.value = b"Orin"
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, handle: int) -> int:
        out._obj.value = 2**36
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, handle: int) -> int:
        out._obj.value = {75: 8, 76: 7}[attribute]
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 12060
        return 0


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    assert gpu.query_device() == Device(0, "Orin", 87, "12.6", 2**36)
    assert str(gpu.query_device()) == "Orin (sm87, 64.0 GiB, driver for CUDA 12.6)"
    with pytest.raises(InvalidArgumentError, match="device: expected 0 to 0, got 1; 1 visible"):
        gpu.query_device(1)


def test_driver_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, message in ((100, "sees no device"), (802, "CUDA driver error 802: system not yet initialized")):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, code=code: FakeDriver(code))
        with pytest.raises(UnsupportedError, match=message):
            gpu.query_device()


def test_jetson_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "L4T_RELEASE", tmp_path / "nv_tegra_release")
    assert gpu.l4t_release() == ""
    (tmp_path / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n# KERNEL\n")
    assert gpu.l4t_release() == "R36 (release), REVISION: 4.3"


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_directory() == Path("/caches/lococo")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as the specification says
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_directory() == Path("/home/me/.cache/lococo")


# --- TensorRT's versions ----------------------------------------------------------------------------------------------


def fake_trt(version: str) -> Any:
    """What differs between versions, as their Python modules have it."""
    major = int(version.partition(".")[0])
    flags = {"EXPLICIT_BATCH": 0} if major < 11 else {}
    flags |= {"STRONGLY_TYPED": 1} if major >= 10 else {}
    dtypes = dict.fromkeys(["FLOAT", "HALF", "INT32", *(["BF16", "INT64"] if major >= 10 else [])])
    levels = {"AMPERE_PLUS": 1} | ({"SAME_COMPUTE_CAPABILITY": 2} if major >= 10 else {})
    return SimpleNamespace(
        __version__=version,
        NetworkDefinitionCreationFlag=SimpleNamespace(**flags),
        DataType=SimpleNamespace(**dtypes),
        HardwareCompatibilityLevel=SimpleNamespace(**levels),
    )


@pytest.mark.parametrize(("version", "flags"), [("8.6.0", 1), ("10.3.0", 2), ("11.0.0.1", 2)])
def test_network_flags(version: str, flags: int) -> None:
    kit = Toolkit("tensorrt", fake_trt(version), None, None)
    assert kit.network_flags() == flags
    assert kit.strongly_typed == (not version.startswith("8"))


def test_versions_are_numbers() -> None:
    for version, expected in (("8.6.1", "8.6.1"), ("10.0.0b6", "10.0.0"), ("11.4.1.15.post1", "11.4.1.15")):
        kit = Toolkit("tensorrt", fake_trt(version), None, None)
        assert kit.version == expected
        assert kit.release == ".".join(expected.split(".")[:3])


def test_what_a_version_lacks_is_refused() -> None:
    kit = Toolkit("tensorrt", fake_trt("8.6.0"), None, None)
    kit.require_dtype("float16")
    with pytest.raises(UnsupportedError, match=r"TensorRT 8\.6\.0 has no bfloat16; export the checkpoint with --fp16"):
        kit.require_dtype("bfloat16")
    assert kit.member("HardwareCompatibilityLevel", "AMPERE_PLUS", "x") == 1
    with pytest.raises(UnsupportedError, match=r"hardware_compatibility_level: TensorRT 8\.6\.0 .* does not offer it"):
        kit.member("HardwareCompatibilityLevel", "SAME_COMPUTE_CAPABILITY", "hardware_compatibility_level")


def test_a_builder_that_does_not_start_is_explained() -> None:
    def null(log: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    kit = Toolkit("tensorrt", SimpleNamespace(__version__="8.6.0", Builder=null), None, SimpleNamespace(summary=str))
    with pytest.raises(BackendError, match=r"TensorRT 8\.6\.0 does not start on NVIDIA H100 .*driver is too old"):
        kit.create_builder(H100)


def test_keys() -> None:
    recipe = load_recipe("orin")
    assert engines_key("tensorrt", "10.3.0", (87,), recipe, None) == "trt-10.3.0-sm87"
    assert engines_key("tensorrt_rtx", "1.7.1", (86, 120), recipe, None) == "rtx-1.7.1-sm86+sm120"
    portable = dataclasses.replace(recipe, hardware_compatibility_level="ampere+")
    assert engines_key("tensorrt", "10.3.0", (80,), portable, 2) == "trt-10.3.0-sm80-ampere+-2layers"


# --- engines.json -----------------------------------------------------------------------------------------------------

PLAN = b"ftrt" + bytes(20) + bytes([8, 6, 0, 12]) + b"the rest of a plan"


def make_engines(bundle: Path, name: str = "trt-8.6.0-sm90") -> tuple[Path, Engines]:
    """Engines of one small plan in `bundle`, as a build would leave them."""
    manifest = read_manifest(bundle)
    directory = bundle / "engines" / name
    directory.mkdir(parents=True)
    (directory / "lm_head_32.plan").write_bytes(PLAN)
    graph = next(g for g in manifest.graphs if g.name == "lm_head_32")
    plan = PlanInfo(
        name=graph.name,
        kind=graph.kind,
        tokens=graph.tokens,
        plan="lm_head_32.plan",
        nbytes=len(PLAN),
        sha256=sha256_file(directory / "lm_head_32.plan"),
        onnx=graph.file,
        onnx_sha256=sha256_file(bundle / graph.file),
        constant_bytes=0,
        workspace_bytes=1024,
        inputs=graph.inputs,
        outputs=graph.outputs,
        weights=(WeightInput("lm_head.weight", (128, 64), "float32", 4096, 32768),),
    )
    engines = Engines(
        producer="lococo-build 0.1.0",
        bundle_id=manifest.bundle_id,
        flavour="tensorrt",
        tensorrt_version="8.6.0",
        plan_version="8.6.0.12",
        sm=(90,),
        gpu_name=H100.name,
        cuda_version="13.0",
        l4t="",
        options=BuildOptions("h100", "shared", "lococo", 2**32, 3, "none", "none", False, False, None),
        state_bytes=manifest.state_bytes,
        plans=(plan,),
    )
    (directory / "engines.json").write_text(engines.to_json())
    return directory, engines


@pytest.fixture
def engines_dir(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "bundle")
    return make_engines(tmp_path / "bundle")[0]


def check(directory: Path, **changes: Any) -> Engines:
    here: dict[str, Any] = {"flavour": "tensorrt", "tensorrt_version": "8.6.0", "sm": 90}
    return check_engines(directory, **(here | changes))


def rewrite(directory: Path, **changes: Any) -> None:
    """Edits engines.json consistently."""
    engines = dataclasses.replace(read_engines(directory), **changes)
    (directory / "engines.json").write_text(engines.to_json())


def test_exact_bytes_of_engines_json(engines_dir: Path) -> None:
    engines = read_engines(engines_dir)
    expected = f"""{{
  "format": "lococo-engines",
  "schema_version": 1,
  "producer": "lococo-build 0.1.0",
  "bundle_id": "{engines.bundle_id}",
  "flavour": "tensorrt",
  "tensorrt_version": "8.6.0",
  "plan_version": "8.6.0.12",
  "sm": [
    90
  ],
  "gpu_name": "NVIDIA H100 80GB HBM3",
  "cuda_version": "13.0",
  "l4t": "",
  "options": {{
    "recipe": "h100",
    "weights": "shared",
    "kernels": "lococo",
    "workspace_limit_bytes": 4294967296,
    "builder_optimization_level": 3,
    "precision": "none",
    "hardware_compatibility_level": "none",
    "version_compatible": false,
    "strongly_typed": false,
    "num_layers": null
  }},
  "state_bytes": 50192,
  "workspace_bytes": 1024,
  "session_bytes": 101408,
  "device_bytes": 134222,
  "constant_bytes": 0,
  "weights_offset": 4096,
  "weights_bytes": 32768,
  "plans": [
    {{
      "name": "lm_head_32",
      "kind": "lm_head",
      "tokens": 32,
      "plan": "lm_head_32.plan",
      "nbytes": 46,
      "sha256": "{engines.plans[0].sha256}",
      "onnx": "lm_head_32.onnx",
      "onnx_sha256": "{engines.plans[0].onnx_sha256}",
      "constant_bytes": 0,
      "workspace_bytes": 1024,
      "inputs": [
        {{
          "name": "hidden_states",
          "shape": [
            1,
            32,
            64
          ],
          "dtype": "float32",
          "nbytes": 8192
        }}
      ],
      "outputs": [
        {{
          "name": "logits",
          "shape": [
            1,
            32,
            128
          ],
          "dtype": "float32",
          "nbytes": 16384
        }}
      ],
      "weights": [
        {{
          "name": "lm_head.weight",
          "shape": [
            128,
            64
          ],
          "dtype": "float32",
          "offset": 4096,
          "nbytes": 32768
        }}
      ]
    }}
  ]
}}
"""
    assert (engines_dir / "engines.json").read_text() == expected
    assert Engines.from_json(expected) == engines
    assert list_engines(engines_dir.parent.parent) == [engines_dir]


def test_the_documentation_shows_engines_json_as_it_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    example = page.partition("```json\n")[2].partition("```")[0]
    assert Engines.from_json(example).to_json() == example


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("lococo-engines", "lococo-bundle", CorruptError, 'expected "format": "lococo-engines"'),
        ('"schema_version": 1', '"schema_version": 2', VersionError, "schema_version: expected 1, got 2"),
        ('"sm": [', '"sm": {', CorruptError, "not valid JSON"),
        ('"l4t": "",', "", CorruptError, "malformed: KeyError: 'l4t'"),
        ('"weights_bytes": 32768', '"weights_bytes": 32769', CorruptError, "sizes contradict each other"),
        ('"nbytes": 8192', '"nbytes": 1', CorruptError, "sizes contradict each other"),
        ('"offset": 4096', '"offset": -4096', CorruptError, "32768 bytes at -4096 contradict shape"),
        ('"plan": "lm_head_32.plan"', '"plan": "../x.plan"', CorruptError, "expected a file name, got '../x.plan'"),
        ('"tokens": 32', '"tokens": "32"', CorruptError, "expected whole numbers"),
        ('"tensorrt_version": "8.6.0"', '"tensorrt_version": "new"', CorruptError, "expected numbers such as 10.3.0"),
        ('"recipe": "h100"', '"colour": "h100"', CorruptError, "malformed: TypeError"),
    ],
)
def test_engines_json_is_checked(engines_dir: Path, old: str, new: str, error: type[Exception], message: str) -> None:
    path = engines_dir / "engines.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(error, match=message):
        read_engines(engines_dir)


def test_engines_that_are_not_there(engines_dir: Path) -> None:
    with pytest.raises(NotFoundError, match="expected engines as written by lococo-build"):
        read_engines(engines_dir.parent / "trt-10.3.0-sm87")
    (engines_dir / "engines.json").write_bytes(b"\xff")
    with pytest.raises(CorruptError, match="not UTF-8 text"):
        read_engines(engines_dir)


# --- preflight --------------------------------------------------------------------------------------------------------


def test_preflight_accepts_what_was_built(engines_dir: Path) -> None:
    assert check(engines_dir) == read_engines(engines_dir)


@pytest.mark.parametrize(
    ("here", "error", "message"),
    [
        ({"tensorrt_version": "8.6.1"}, VersionError, "built with TensorRT 8.6.0, found TensorRT 8.6.1"),
        ({"tensorrt_version": "10.3.0"}, VersionError, "built with TensorRT 8.6.0, found TensorRT 10.3.0"),
        ({"flavour": "tensorrt_rtx"}, VersionError, "built with TensorRT 8.6.0, found TensorRT for RTX 8.6.0"),
        ({"sm": 87}, UnsupportedError, "built for sm90, found a device of sm87"),
    ],
)
def test_preflight_refuses_other_machines(
    engines_dir: Path, here: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(engines_dir, **here)


def test_compatible_engines_are_accepted_where_tensorrt_says_so(engines_dir: Path) -> None:
    options = read_engines(engines_dir).options
    rewrite(engines_dir, options=dataclasses.replace(options, version_compatible=True))
    check(engines_dir, tensorrt_version="10.3.0")
    with pytest.raises(VersionError, match=r"found TensorRT 8\.5\.3"):
        check(engines_dir, tensorrt_version="8.5.3")
    rewrite(engines_dir, options=dataclasses.replace(options, hardware_compatibility_level="ampere+"))
    check(engines_dir, sm=120)
    for sm in (75, 87, 110):
        with pytest.raises(UnsupportedError, match=f"found a device of sm{sm}"):
            check(engines_dir, sm=sm)


def test_preflight_refuses_damaged_plans(engines_dir: Path) -> None:
    plan = engines_dir / "lm_head_32.plan"
    plan.write_bytes(PLAN[:-1])
    with pytest.raises(CorruptError, match="expected 46 bytes, got 45; run lococo-build --force"):
        check(engines_dir)
    plan.write_bytes(PLAN[:-1] + b"N")
    with pytest.raises(CorruptError, match="expected sha256 "):
        check(engines_dir)
    plan.unlink()
    with pytest.raises(NotFoundError, match=r"lm_head_32\.plan: not found"):
        check(engines_dir)


def test_preflight_refuses_forged_headers(engines_dir: Path) -> None:
    """Of the plan, with a matching sha256, and of engines.json."""
    plan = engines_dir / "lm_head_32.plan"
    plan.write_bytes(PLAN.replace(bytes([8, 6, 0, 12]), bytes([10, 3, 0, 26])))
    info = dataclasses.replace(read_engines(engines_dir).plans[0], sha256=sha256_file(plan))
    rewrite(engines_dir, plans=(info,))
    with pytest.raises(VersionError, match=r"expected the header of TensorRT 8\.6\.0\.12, got 10\.3\.0\.26"):
        check(engines_dir)
    rewrite(engines_dir, plan_version="10.3.0.26")
    with pytest.raises(VersionError, match=r"its header says TensorRT 10\.3\.0\.26, engines\.json says 8\.6\.0"):
        check(engines_dir)


def test_headers() -> None:
    assert plan_version(PLAN) == "8.6.0.12"
    assert plan_version(PLAN[:27]) == ""
    assert plan_version(b"\x7fELF" + PLAN[4:]) == ""
    assert plan_version(PLAN[:4] + b"\x01" + PLAN[5:]) == ""  # a layout of the future


def test_preflight_refuses_engines_of_another_bundle(engines_dir: Path, tmp_path: Path) -> None:
    export_golden("c1_baseline", tmp_path / "other", dtype="float16")
    moved = tmp_path / "other" / "engines" / engines_dir.name
    shutil.copytree(engines_dir, moved)
    with pytest.raises(CorruptError, match=r"built for bundle [0-9a-f]{16}, found in bundle [0-9a-f]{16}"):
        check(moved)


def test_preflight_refuses_engines_of_older_graphs(engines_dir: Path) -> None:
    info = dataclasses.replace(read_engines(engines_dir).plans[0], onnx_sha256="0" * 64)
    rewrite(engines_dir, plans=(info,))
    with pytest.raises(CorruptError, match=r"built from other versions of lm_head_32\.onnx"):
        check(engines_dir)


def test_preflight_refuses_debugging_builds(engines_dir: Path) -> None:
    rewrite(engines_dir, options=dataclasses.replace(read_engines(engines_dir).options, num_layers=1))
    with pytest.raises(UnsupportedError, match="built with --num-layers 1 of 2, for debugging"):
        check(engines_dir)
    check(engines_dir, partial=True)


def test_damaged_bundles_are_not_built(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = read_manifest(copy)
    check_files(copy, manifest)
    weights = copy / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[5000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.onnx\.data: expected .* bytes of sha256"):
        check_files(copy, manifest)
    weights.unlink()
    with pytest.raises(NotFoundError, match=r"model\.onnx\.data: not found; copy or export the bundle again"):
        check_files(copy, manifest)


# --- prepared graphs --------------------------------------------------------------------------------------------------

NUMPY = {"float32": np.float32, "float16": np.float16, "int32": np.int32}


def random_inputs(spec: GraphSpec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    fixed = {"past_length": 40, "num_tokens": 20, "position_ids": 1000}

    def value(t: TensorSpec) -> np.ndarray:
        if t.dtype == "int32":
            return (
                np.full(t.shape, fixed[t.name], "int32") if t.name in fixed else rng.integers(0, 96, t.shape, "int32")
            )
        data = rng.standard_normal(t.shape).astype(NUMPY[t.dtype])
        return np.abs(data) if "scores" in t.name else data

    return {t.name: value(t) for t in spec.inputs}


def run_onnx(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("weights", ["shared", "embedded"])
def test_prepared_graphs_compute_the_same(bundle: Path, tmp_path: Path, weights: str) -> None:
    shutil.copy(bundle / "model.onnx.data", tmp_path)
    data = (bundle / "model.onnx.data").read_bytes()
    for spec in read_manifest(bundle).graphs:
        graph = prepare_graph(bundle / spec.file, spec, weights=weights)
        (tmp_path / spec.file).write_bytes(graph.model)
        assert not onnx.load(tmp_path / spec.file, load_external_data=False).functions
        assert (graph.inputs, graph.outputs) == (spec.inputs, spec.outputs)
        given = {
            w.name: np.frombuffer(data, NUMPY[w.dtype], w.nbytes // 4, w.offset).reshape(w.shape) for w in graph.weights
        }
        assert bool(given) == (weights == "shared" and spec.kind != "fusion")
        inputs = random_inputs(spec)
        expected = run_onnx(bundle / spec.file, inputs)
        for name, found in run_onnx(tmp_path / spec.file, inputs | given).items():
            np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_shared_weights_are_the_matrices(bundle: Path) -> None:
    """Norms, RoPE tables and fusion heads stay in the plans; all plans name the same bytes for a weight."""
    graphs = {s.name: prepare_graph(bundle / s.file, s) for s in read_manifest(bundle).graphs}
    projections = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    matrices = {f"model.layers.{i}.{p}.weight" for i in range(2) for p in projections}
    everything = matrices | {"model.embed_tokens.weight", "lm_head.weight"}
    assert {w.name for w in graphs["decoder_1"].weights} == everything
    assert graphs["decoder_1"].weights == graphs["decoder_32"].weights
    assert [w.name for w in graphs["lm_head_32"].weights] == ["lm_head.weight"]
    assert set(graphs["lm_head_32"].weights) < set(graphs["decoder_1"].weights)
    assert graphs["fusion_1"].weights == ()
    total = sum(w.nbytes for w in graphs["decoder_1"].weights)
    embedded = prepare_graph(bundle / "decoder_1.onnx", read_manifest(bundle).graphs[0], weights="embedded")
    assert embedded.constant_bytes == graphs["decoder_1"].constant_bytes + total


def test_fewer_layers(bundle: Path, tmp_path: Path) -> None:
    """The layers that are left compute what they did."""
    shutil.copy(bundle / "model.onnx.data", tmp_path)
    for spec in read_manifest(bundle).graphs:
        graph = prepare_graph(bundle / spec.file, spec, weights="embedded", num_layers=1)
        (tmp_path / spec.file).write_bytes(graph.model)
        inputs = random_inputs(spec)
        expected = run_onnx(bundle / spec.file, inputs)
        found = run_onnx(tmp_path / spec.file, {t.name: inputs[t.name] for t in graph.inputs})
        assert set(found) == {t.name for t in graph.outputs} == {n for n in expected if ".1" not in n}
        for name in found:
            same = spec.kind != "decoder" or name.endswith((".key", ".value", "scores.0"))
            assert np.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5) == same, name
    spec = read_manifest(bundle).graphs[0]
    whole = prepare_graph(bundle / spec.file, spec, num_layers=2)
    assert (whole.inputs, whole.outputs, whole.weights) == (
        spec.inputs,
        spec.outputs,
        prepare_graph(bundle / spec.file, spec).weights,
    )
    for n in (0, 3):
        with pytest.raises(InvalidArgumentError, match=f"num_layers: expected 1 to 2, got {n}"):
            prepare_graph(bundle / spec.file, spec, num_layers=n)


@pytest.mark.parametrize("num_layers", [0, 3])
def test_layers_that_are_not_there_are_refused_before_tensorrt_is_asked(bundle: Path, num_layers: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"num_layers: expected 1 to 2, got {num_layers}"):
        build_engines(bundle, load_recipe("h100"), Target((90,), H100), num_layers=num_layers)
    assert not (bundle / "engines").exists()


def test_files_that_are_not_onnx(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "decoder_1.onnx").write_bytes(b"garbage")
    with pytest.raises(CorruptError, match=r"decoder_1\.onnx: not an ONNX file"):
        prepare_graph(tmp_path / "decoder_1.onnx", read_manifest(bundle).graphs[0])


# --- the package ------------------------------------------------------------------------------------------------------


def test_no_torch_is_imported() -> None:
    probe = (
        "import sys, json, lococo_engines.cli; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    found = set(json.loads(result.stdout))
    assert "lococo_engines" in found
    assert not found & {"torch", "transformers", "lococo_export", "tensorrt", "tensorrt_rtx", "polygraphy"}


def test_public_names() -> None:
    modules = {name for name, value in vars(lococo_engines).items() if type(value) is type(sys)}
    public = {name for name in vars(lococo_engines) if not name.startswith("_")} - modules
    assert public == set(lococo_engines.__all__)


# --- networks of kernels ---------------------------------------------------------------------------------------------


OPS = Path(__file__).parents[1] / "runtime/csrc/trt/ops"


def kernel_networks(bundle: Path, num_layers: int | None = None) -> dict[str, KernelNetwork]:
    manifest = read_manifest(bundle)
    return {
        spec.name: kernel_network(manifest, spec, {w.name: w for w in weight_inputs(bundle / spec.file)}, num_layers)
        for spec in manifest.graphs
    }


def test_a_network_of_kernels_has_the_graphs_inputs_and_outputs(bundle: Path) -> None:
    networks = kernel_networks(bundle)
    for spec in read_manifest(bundle).graphs:
        network = networks[spec.name]
        assert network.inputs == spec.inputs
        assert set(network.outputs) == set(spec.outputs)
        assert {w.name for w in network.weights} == {w.name for w in weight_inputs(bundle / spec.file)}


def test_numbers_of_a_node_stand_in_the_order_of_the_kernels() -> None:
    header = (OPS / "op.h").read_text(encoding="utf-8")
    enum = header.partition("enum OpNumber")[2].partition("kOpNumbers")[0]
    theirs = re.findall(r"^  kOp(\w+),", enum, re.MULTILINE)
    ours = [f.name.replace("_", "") for f in dataclasses.fields(_Numbers)]
    assert [name.lower() for name in theirs] == ours
    limits = dict(re.findall(r"(kMax\w+) = (\d+);", (OPS / "ops.h").read_text(encoding="utf-8")))
    assert int(limits["kMaxConvLayers"]) == MAX_CONV_LAYERS
    assert int(limits["kMaxFusionLayers"]) == MAX_FUSION_LAYERS


def test_every_node_reads_what_is_there_already(bundle: Path) -> None:
    for name, network in kernel_networks(bundle).items():
        there = {t.name for t in network.inputs} | {w.name for w in network.weights}
        for node in network.nodes:
            assert there.issuperset(node.inputs), (name, node.name)
            there |= {t.name for t in node.outputs}


def test_a_network_of_kernels_can_be_cut_short(bundle: Path) -> None:
    network = kernel_networks(bundle, num_layers=1)["decoder_1"]
    assert [n.name for n in network.nodes] == ["embed", "layer.0", "head"]
    assert not any(".1." in t.name for t in (*network.inputs, *network.outputs))


class Plugin:
    """What op.cc says of nodes: the host's part of the plugin, compiled with CUDA's names alone."""

    CUDA = "#pragma once\nusing cudaStream_t = void*;\nenum cudaError_t { cudaSuccess, cudaErrorInvalidValue };\n"
    CODE = """
        #include <cstdio>
        #include <cstring>
        #include "trt/ops/op.cc"
        static lococo::trt::OpParameters of(const int32_t* numbers) {
          lococo::trt::OpParameters op{};
          std::memcpy(op.numbers.data(), numbers, sizeof op.numbers);
          return op;
        }
        #define PUBLIC extern "C" __attribute__((visibility("default")))
        PUBLIC void unsupported(const int32_t* numbers, char* text) {
          std::snprintf(text, 256, "%s", lococo::trt::unsupported(of(numbers)).c_str());
        }
        PUBLIC int32_t inputs(const int32_t* numbers) { return lococo::trt::num_inputs(of(numbers)); }
        PUBLIC int32_t outputs(const int32_t* numbers) { return lococo::trt::num_outputs(of(numbers)); }
    """

    def __init__(self, compiler: str, folder: Path) -> None:
        (folder / "cuda_runtime_api.h").write_text(self.CUDA)
        (folder / "plugin.cc").write_text(self.CODE)
        source = OPS.parents[2]
        # without the functions that start kernels, which the linker would miss
        unused = ("-fvisibility=hidden", "-ffunction-sections", "-fno-jump-tables", "-Wl,--gc-sections")
        subprocess.run(
            [compiler, "-std=c++17", "-shared", "-fPIC", *unused, "-I.", f"-I{source}/csrc", f"-I{source}/include",
             "-Wl,--no-undefined", "plugin.cc", "-o", "plugin.so"], cwd=folder, check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(folder / "plugin.so"))

    def unsupported(self, numbers: Sequence[int]) -> str:
        text = ctypes.create_string_buffer(256)
        self.library.unsupported(self._words(numbers), text)
        return text.value.decode()

    def arity(self, numbers: Sequence[int]) -> tuple[int, int]:
        """How many inputs and outputs."""
        return self.library.inputs(self._words(numbers)), self.library.outputs(self._words(numbers))

    @staticmethod
    def _words(numbers: Sequence[int]) -> Any:
        return (ctypes.c_int32 * len(numbers))(*numbers)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Plugin:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, c++")
    return Plugin(compiler, tmp_path_factory.mktemp("plugin"))


@pytest.mark.parametrize(
    "name",
    ["c1_baseline", "c3_conv2_expand2_silu", "aging", "accumulated_fp16", "batch-h2o-mqa", "batch-h2o-biases",
     "batch-lococo-accumulated-scores"],
)  # fmt: skip
def test_nodes_are_what_the_plugin_takes(plugin: Plugin, cpu: Backend, name: str) -> None:
    path = cpu.bundle(name)
    manifest = read_manifest(path)
    for spec in manifest.graphs:
        if spec.batch != 1:
            continue
        weights = {w.name: w for w in weight_inputs(path / spec.file)}
        for node in kernel_network(manifest, spec, weights).nodes:
            assert plugin.unsupported(node.numbers) == ""
            assert plugin.arity(node.numbers) == (len(node.inputs), len(node.outputs)), (spec.name, node.name)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", {"hidden_size": 66}, "hidden_size: expected a multiple of 4, got 66"),
        ("model", {"intermediate_size": 130}, "intermediate_size: expected a multiple of 4, got 130"),
        ("model", {"head_dim": 24}, "head_dim: expected 4 times a power of two, at most 128, got 24"),
        ("model", {"head_dim": 256}, "head_dim: expected 4 times a power of two, at most 128, got 256"),
        ("model", {"head_dim": 2}, "head_dim: expected 4 times a power of two, at most 128, got 2"),
        ("cache", {"num_conv_layers": 5}, "num_conv_layers: expected at most 4, got 5"),
    ],
)
def test_shapes_the_kernels_cannot_run_are_refused(
    plugin: Plugin, bundle: Path, part: str, change: dict, message: str
) -> None:
    manifest = read_manifest(bundle)
    changed = dataclasses.replace(getattr(manifest, part), **change)
    with pytest.raises(UnsupportedError, match=re.escape(message) + r"; build with --kernels tensorrt"):
        require_shapes(dataclasses.replace(manifest, **{part: changed}))
    ((name, value),) = change.items()
    field = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_conv_layers": "num_conv"}.get(
        name, name
    )
    refusals = set()
    for network in kernel_networks(bundle).values():
        for node in network.nodes:
            numbers = list(node.numbers)
            numbers[[f.name for f in dataclasses.fields(_Numbers)].index(field)] = value
            refusals.add(plugin.unsupported(numbers))
    assert refusals - {""} == {message}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "embedded"}, "weights: expected shared"),
        ({"version_compatible": True}, "version_compatible: expected false with kernels lococo"),
        ({"precision": "prefer"}, "precision: expected none with kernels lococo"),
        ({"kernels": "cutlass"}, "kernels: expected one of tensorrt, lococo"),
    ],
)
def test_kernels_exclude_what_they_cannot_do(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("h100").replace(**change)


def test_rtx_has_no_plugin_kernels() -> None:
    with pytest.raises(ConfigError, match="kernels: expected tensorrt"):
        load_recipe("rtx").replace(kernels="lococo")
    with pytest.raises(ConfigError, match="precision: expected none"):
        load_recipe("rtx").replace(precision="prefer")


def test_precision_is_refused_where_tensorrt_follows_the_onnx(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = SimpleNamespace(STRONGLY_TYPED=1)
    trt = SimpleNamespace(__version__="10.3.0", NetworkDefinitionCreationFlag=flags, DataType=SimpleNamespace(FLOAT=0))
    kit = Toolkit("tensorrt", trt, polygraphy=None, log=None)
    monkeypatch.setattr("lococo_engines.build.load_toolkit", lambda flavour, verbose: kit)
    recipe = load_recipe("h100").replace(kernels="tensorrt", precision="prefer")
    with pytest.raises(UnsupportedError, match=r"precision: expected none with TensorRT 10\.3\.0.*got prefer"):
        build_engines(bundle, recipe, Target((90,), H100))
