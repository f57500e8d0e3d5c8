"""The table of vLLM's symbols: the installed vLLM has them all, each one that moves is noticed, and none is idle."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_native.vllm
from moe_native.vllm.symbols import TABLE, Member, Symbols

CONTRACT = Path(__file__).parents[2] / "contract"
sys.path.insert(0, str(CONTRACT))

from sources import Module, Sources  # noqa: E402


@pytest.fixture(scope="module")
def installed() -> Path:
    """The directory that holds the installed vLLM, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed here")
    return Path(spec.origin).parents[1]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONTRACT / "check.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_installed_vllm_has_every_symbol(installed: Path) -> None:
    done = check(installed)
    assert done.returncode == 0 and done.stdout.endswith(" symbols\n"), done.stdout + done.stderr


def test_the_check_fails_and_names_what_moved(installed: Path, tmp_path: Path) -> None:
    def all_but_python(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if not name.endswith(".py") and not Path(directory, name).is_dir()]

    shutil.copytree(installed / "vllm", tmp_path / "vllm", ignore=all_but_python)
    file = tmp_path / "vllm/v1/core/sched/output.py"
    file.write_text(file.read_text().replace("num_scheduled_tokens: dict", "tokens_by_request: dict"))
    done = check(tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert "sched.output:SchedulerOutput has no num_scheduled_tokens; moe_native/vllm (steps) relies on it: how" in line


class Moved(Sources):
    """Sources in which some names are other names."""

    def __init__(self, base: Sources, names: set[str]) -> None:
        super().__init__(base.root)
        self.base, self.names = base, re.compile(rf"\b({'|'.join(names)})\b")

    def _module(self, name: str) -> Module | None:
        module = self.base.module(name)
        if module is None or not self.names.search(module.text):
            return module
        return Module(name, self.names.sub("moved_away", module.text), module.package)


@pytest.fixture(scope="module")
def sources(installed: Path) -> Sources:
    return Sources(installed)


@pytest.mark.parametrize("symbols", TABLE, ids=lambda symbols: symbols.place.partition(" ")[0])
def test_each_symbol_that_moves_is_noticed(symbols: Symbols, sources: Sources) -> None:
    assert sources.missing(symbols) == []
    for written in symbols.members:
        found = Moved(sources, {member.name for member in Member.readings(written)}).missing(symbols)
        assert any(f" has no {written}; " in line for line in found)


@pytest.mark.parametrize("symbols", TABLE, ids=lambda symbols: symbols.place.partition(" ")[0])
def test_each_symbol_is_used_where_the_table_says(symbols: Symbols) -> None:
    directory = Path(moe_native.vllm.__file__).parent
    used = "".join((directory / f"{name}.py").read_text() for name in symbols.by.split(", "))
    for written in symbols.members:
        # Where only the source's text matters, the symbol is vLLM's own business.
        names = [member.name for member in Member.readings(written) if not member.text]
        assert not names or any(re.search(rf"\b{name}\b", used) for name in names), f"{written} is not in {symbols.by}"


TREE = {
    "vllm/__init__.py": "",
    "vllm/config/__init__.py": "from .model import Model as ModelConfig\n",
    "vllm/config/model.py": """
from typing import Generic, NamedTuple, TypeVar
from vllm.base import Base
T = TypeVar("T")
LIMIT: int = 4
if LIMIT:
    def helper(a, b): return a
class Model(Base, Generic[T]):
    field: int
    def __init__(self, c):
        self.one, self.two = c
        self.three: int = 3
    def run(self, batch, state=None, *, flag): return f"{batch}-{state}"
class Pair(NamedTuple):
    left: int
""",
    "vllm/base.py": """
try:
    import fast
except ImportError:
    fast = None
class Base:
    @property
    def inherited(self): return self._hidden
    def run(self, other): return 0
""",
}


@pytest.fixture
def tree(tmp_path: Path) -> Sources:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Sources(tmp_path)


@pytest.mark.parametrize(
    ("place", "there", "not_there"),
    [
        ("vllm.config.model", ["LIMIT", "helper(a, b)", "helper(a)", "Model", "TypeVar"], ["run", "helper(b)", "a"]),
        ("vllm.base", ["fast"], ["slow", "fast(a)"]),
        ("vllm.config.model:Pair", ["left"], ["right"]),
        # Through a re-export, another name and a base class.
        (
            "vllm.config:ModelConfig",
            ["field", "one", "two", "three", "run(batch)", "run(batch, state)", "inherited", "no | one"],
            ["_hidden", "c", "run(other)", "run(batch, flag)", "run(state)", "field(a)", "no | nothing"],
        ),
        ("vllm.config:ModelConfig", ['run: f"{batch}-{state}"', "inherited: _hidden"], ["run: _hidden", "one: c"]),
        ("vllm.gone:Model | vllm.config.model:Model", ["field"], ["fields"]),
    ],
)
def test_how_sources_are_read(place: str, there: list[str], not_there: list[str], tree: Sources) -> None:
    assert tree.missing(Symbols(place, tuple(there), by="x", why="y")) == []
    found = tree.missing(Symbols(place, tuple(not_there), by="x", why="y"))
    assert found == [f"{place} has no {name}; moe_native/vllm (x) relies on it: y" for name in not_there]


@pytest.mark.parametrize("place", ["vllm.gone", "vllm.config:Model", "vllm.base:Gone"])
def test_a_place_that_is_gone_is_said_once(place: str, tree: Sources) -> None:
    found = tree.missing(Symbols(place, ("one", "two"), by="x", why="y"))
    assert found == [f"{place} is gone; moe_native/vllm (x) relies on it: y"]


def test_a_directory_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no vllm/__init__\.py"):
        Sources(tmp_path)
