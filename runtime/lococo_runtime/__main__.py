"""Where the C library of this package is: `python -m lococo_runtime --cmakedir`, for build systems."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import _c_api
from ._exceptions import LococoError, NotFoundError


def _installed(name: str) -> Path:
    """A file or folder of the C library in this package's installation."""
    tried = [folder / name for folder in _c_api.package_folders()]
    for path in tried:
        if path.exists():
            return path
    raise NotFoundError(
        f"{name} was not found; tried {', '.join(map(str, tried))}; install the package with pip, which builds it"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lococo_runtime", description="Where to find what C and C++ programs build with."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--version", action="store_true", help="of the C library")
    what.add_argument("--includes", action="store_true", help="compiler flags for lococo.h and lococo.hpp")
    what.add_argument("--cmakedir", action="store_true", help="lococo_DIR, for find_package(lococo CONFIG)")
    what.add_argument("--pkgconfigdir", action="store_true", help="for PKG_CONFIG_PATH")
    what.add_argument("--onnxruntime", action="store_true", help="the library, for $LOCOCO_ONNXRUNTIME")
    args = parser.parse_args()
    try:
        if args.version:
            print(_c_api.library().lococo_version().decode())
        elif args.includes:
            print(f"-I{_installed('include/lococo.h').parent}")
        elif args.cmakedir:
            print(_installed("lib/cmake/lococo"))
        elif args.pkgconfigdir:
            print(_installed("lib/pkgconfig"))
        elif path := _c_api.find_onnxruntime():
            print(path)
        else:
            raise NotFoundError("ONNX Runtime was not found; pip install onnxruntime")
    except LococoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
