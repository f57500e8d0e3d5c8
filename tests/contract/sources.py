"""vLLM's sources as they lie in a directory, read without importing them: is a symbol there?

Follows what a reader follows: base classes, names that a module imports from another of vLLM's, fields of dataclasses
and what methods assign to `self`. Anything else (a name made by `setattr` or `exec`) counts as not there.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from moe_native.vllm.symbols import Member, Symbols

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """One parsed file."""

    def __init__(self, name: str, text: str, package: bool) -> None:
        self.name, self.text, self.package = name, text, package
        self.tree = ast.parse(text)

    def definitions(self, name: str) -> list[ast.stmt]:
        """The statements at its top level, under `if` and `try` too, that define `name`."""
        return [statement for statement in _flat(self.tree.body) if name in _defined(statement)]

    def source_of(self, statement: ast.AST) -> str:
        return ast.get_source_segment(self.text, statement) or ""

    def imported_from(self, name: str) -> tuple[str, str] | None:
        """The module and the name there, where `name` is imported from another module."""
        for statement in self.definitions(name):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self._absolute(statement), alias.name
        return None

    def _absolute(self, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - statement.level + self.package]
        return ".".join([*base, *(statement.module or "").split(".")]).rstrip(".")


class Sources:
    """`root` is the directory that holds `vllm/`."""

    def __init__(self, root: Path) -> None:
        if not (root / "vllm" / "__init__.py").is_file():
            raise FileNotFoundError(f"{root} holds no vllm/__init__.py")
        self.root = root
        self.module = functools.cache(self._module)

    def missing(self, symbols: Symbols) -> list[str]:
        """The members that are not there, each with the place and what relies on it."""
        owners = [owner for place in symbols.places if (owner := self._owner(place)) is not None]
        if not owners:
            return [f"{symbols.place} is gone; moe_native/vllm ({symbols.by}) relies on it: {symbols.why}"]
        return [
            f"{symbols.place} has no {written}; moe_native/vllm ({symbols.by}) relies on it: {symbols.why}"
            for written in symbols.members
            if not any(self._has(owner, member) for owner in owners for member in Member.readings(written))
        ]

    def _module(self, name: str) -> Module | None:
        path = self.root.joinpath(*name.split("."))
        for file, package in ((path.with_name(path.name + ".py"), False), (path / "__init__.py", True)):
            if file.is_file():
                return Module(name, file.read_text(encoding="utf-8"), package)
        return None

    def _owner(self, place: str) -> tuple[Module, ast.ClassDef | None] | None:
        name, _, cls = place.partition(":")
        module = self.module(name)
        if module is None or not cls:
            return None if module is None else (module, None)
        return self._class(module, cls)

    def _class(self, module: Module, name: str) -> tuple[Module, ast.ClassDef] | None:
        found = next((d for d in module.definitions(name) if isinstance(d, ast.ClassDef)), None)
        if found is not None:
            return module, found
        elsewhere = module.imported_from(name)
        other = self.module(elsewhere[0]) if elsewhere else None
        return self._class(other, elsewhere[1]) if elsewhere and other is not None else None

    def _has(self, owner: tuple[Module, ast.ClassDef | None], member: Member) -> bool:
        """The nearest definition decides, as it does in Python; a method may call on to another that has the text."""
        module, cls = owner
        if cls is None:
            return any(_fits(module, d, member) for d in module.definitions(member.name))
        for where, base in self._with_bases(module, cls):
            found = [statement for statement in _flat(base.body) if member.name in _defined(statement)]
            if found:
                return any(_fits(where, statement, member) for statement in found)
            if member.name in _assigned_to_self(base):
                return not member.parameters and not member.text
        return False

    def _with_bases(self, module: Module, cls: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
        yield module, cls
        for base in cls.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(name, ast.Name) and (found := self._class(module, name.id)) is not None:
                yield from self._with_bases(*found)


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            for inner in (statement.body, statement.orelse, getattr(statement, "finalbody", [])):
                yield from _flat(inner)
            for handler in getattr(statement, "handlers", []):
                yield from _flat(handler.body)


def _defined(statement: ast.stmt) -> set[str]:
    """Names that a statement defines where it stands."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.ImportFrom(names=names) | ast.Import(names=names):
            return {alias.asname or alias.name for alias in names}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


def _assigned_to_self(cls: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for method in _flat(cls.body)
        if isinstance(method, Function)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _fits(module: Module, statement: ast.stmt, member: Member) -> bool:
    if member.text and member.text not in module.source_of(statement):
        return False
    if not member.parameters:
        return True
    if not isinstance(statement, Function):
        return False
    names = [argument.arg for argument in (*statement.args.posonlyargs, *statement.args.args)]
    if names[:1] == ["self"]:
        names = names[1:]
    return tuple(names[: len(member.parameters)]) == member.parameters
