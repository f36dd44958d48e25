"""The commands of the distribution and their parsers."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent


def find_commands() -> dict[str, str]:
    """Name -> "module:function", as pyproject.toml installs them."""
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]\n")[2]
    return dict(re.findall(r'^(lococo-\w+) = "(.+)"$', scripts.partition("\n[")[0], re.MULTILINE))


COMMANDS = find_commands()


def load_main(command: str) -> Callable[[list[str]], int]:
    module, _, function = COMMANDS[command].partition(":")
    main: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return main


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command makes, caught when it is used."""

    class Caught(BaseException):
        pass

    def catch(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Caught(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            load_main(command)([])
        except Caught as caught:
            parser: argparse.ArgumentParser = caught.args[0]
            return parser
    raise AssertionError(f"{command} parsed nothing")
