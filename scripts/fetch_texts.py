"""Make .cache/texts: long real texts to read.

Jane Austen's six novels (public domain) come from the Debian and Ubuntu package r-cran-janeaustenr, which apt-get
downloads and dpkg unpacks without root. code/ holds three long files of the running Python's standard library.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from rdata import read_lazy_load

CACHE = Path(__file__).resolve().parent.parent / ".cache"
PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata"
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
CODE = ("argparse.py", "tarfile.py", "typing.py")


def unwrap(lines: list[str]) -> str:
    """Hard-wrapped prose -> one line a paragraph, with an empty line between two.

    Indented lines (verse, addresses) keep their breaks. The two spaces after a full stop become one.
    """
    text = ""
    wrapped = False  # the last line may go on in the next
    for line in (line.rstrip() for line in lines):
        prose = line[:1].strip() != ""
        if not line:
            text = text.rstrip("\n") + "\n\n"
        elif prose and wrapped:
            text += ("" if text.endswith("--") else " ") + line
        else:
            text += ("" if text.endswith("\n") else "\n") + line
        wrapped = prose
    return re.sub(r"(?<=\S)  +", " ", text).strip("\n") + "\n"


def download(package: str, folder: Path) -> Path:
    """The package unpacked under the folder. As apt-get's lists may be missing or old, a second try makes fresh ones
    in the folder, where that needs no root."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise SystemExit(f"{package} needs apt-get and dpkg, which are not here; give scripts/demo a text with --text")
    own = [f"-oDir::State::Lists={folder / 'lists'}", f"-oDir::Cache={folder / 'cache'}"]
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    print(f"fetching {package}", flush=True)
    for commands in ([["download"]], [[*own, "update"], [*own, "download"]]):
        for arguments in commands:
            command = ["apt-get", "-qq", "-oAPT::Sandbox::User=", *arguments]
            if arguments[-1] == "download":
                command.append(package)
            subprocess.run(command, cwd=folder, check=False)
        if found := list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["dpkg", "-x", found[0].name, "unpacked"], cwd=folder, check=True)
            return folder / "unpacked"
    raise SystemExit(f"apt-get could not download {package}: see its messages above")


def publish(target: Path, text: str) -> None:
    staged = target.with_name(f".{target.name}.part")
    staged.write_text(text, encoding="utf-8")
    staged.replace(target)


def fetch_novels(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        values = read_lazy_load(download(PACKAGE, Path(scratch)) / DATABASE)
    if missing := set(NOVELS) - set(values):
        raise SystemExit(f"{PACKAGE} lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(values))}")
    for name in NOVELS:
        publish(folder / f"{name}.txt", unwrap(values[name]))


def fetch_code(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in CODE:
        publish(folder / name, (library / name).read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="the folder that gets texts/")
    folder = parser.parse_args().cache.resolve() / "texts"
    if not all((folder / "code" / name).is_file() for name in CODE):
        fetch_code(folder / "code")
    if not all((folder / f"{name}.txt").is_file() for name in NOVELS):
        fetch_novels(folder)
    print(f"texts: {folder}")


if __name__ == "__main__":
    main()
