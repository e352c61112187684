"""Contract 10: a config means what it says, so the package reads every key that a config may set."""

import ast
import dataclasses
import functools
import typing
from pathlib import Path

from pydantic.dataclasses import dataclass

import retool_jax
from retool_jax.fields import CHECKED
from retool_jax.mesh_config import AXES, MeshConfig
from retool_jax.run.schema import CheckpointConfig, EngineRun, EvaluateRun, RLRun, ServeRun, SFTRun

hints_of = functools.cache(typing.get_type_hints)


def sections_of(run: type) -> dict[str, type]:
    """The dataclasses that a run is made of, by the names that annotations give them."""
    found = {cls.__name__: run for cls in run.__mro__ if dataclasses.is_dataclass(cls)}
    for wanted in hints_of(run).values():
        if dataclasses.is_dataclass(wanted):
            found |= sections_of(wanted)
    return found


class Readers(ast.NodeVisitor):
    """Which fields of which config class the package reads, by following annotated arguments and attributes.

    Checks of a value (`__post_init__`) do not count. `attributes` knows what ordinary classes keep of a config. What is
    read of a run of any task (`Run`, or `EngineRun` for those that draw) is read of each.
    """

    def __init__(self, sections: dict[str, type]) -> None:
        self.sections = sections
        self.read: set[tuple[str, str]] = set()
        self.attributes: dict[str, dict[str, str]] = {}
        self.names: dict[str, str | None] = {}
        self.owner: str | None = None

    def annotated(self, annotation: ast.expr | None) -> str | None:
        names = [n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)] if annotation else []
        known = [name for name in names if name in self.sections] + [name for name in names if name in self.attributes]
        return next(iter(known), None)

    def record(self, section: str, field: str) -> None:
        for cls in self.sections[section].__mro__:
            if field in vars(cls).get("__annotations__", {}):
                self.read.add((cls.__name__, field))

    def kind(self, node: ast.expr) -> str | None:
        """The class of an expression, if it is one of a config; reads on the way are recorded."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name)
            case ast.Attribute(value=value, attr=attr):
                base = self.kind(value)
                if base in self.sections:
                    self.record(base, attr)
                    wanted = hints_of(self.sections[base]).get(attr)
                    return wanted.__name__ if dataclasses.is_dataclass(wanted) else None
                return self.attributes.get(base, {}).get(attr)
            case ast.BoolOp(values=values):
                return next(filter(None, map(self.kind, values)), None)
            case ast.Call(func=ast.Name(id="getattr"), args=[target, name, *_]) if base := self.kind(target):
                fields = [f.name for f in dataclasses.fields(self.sections[base])] if base in self.sections else []
                for field in [name.value] if isinstance(name, ast.Constant) else fields:
                    self.record(base, field)
            case ast.Call(func=ast.Name(id="asdict" as name) | ast.Attribute(attr="asdict" as name), args=[target]):
                if (base := self.kind(target)) in self.sections:
                    for field in dataclasses.fields(self.sections[base]):
                        self.record(base, field.name)
            case ast.Call(func=ast.Name(id="replace") | ast.Attribute(attr="replace"), args=[target, *_]):
                return self.kind(target)
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if (base := self.kind(value)) in self.sections:
                method = getattr(self.sections[base], attr, None)
                return getattr(hints_of(method).get("return"), "__name__", None) if method else None
        return None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.owner = self.owner, node.name
        known = self.attributes.setdefault(node.name, {})
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and (kind := self.annotated(item.annotation)):
                known[item.target.id] = kind
        self.generic_visit(node)
        self.owner = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "__post_init__":
            return
        outer, self.names = self.names, dict(self.names)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            self.names[argument.arg] = self.owner if argument.arg == "self" else self.annotated(argument.annotation)
        self.generic_visit(node)
        self.names = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        pairs = [(target, node.value) for target in node.targets]
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=False)
            elif isinstance(target, ast.Name):
                self.names[target.id] = self.kind(value)
            elif isinstance(target, ast.Attribute) and self.owner and (kind := self.kind(value)):
                self.attributes[self.owner][target.attr] = kind
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.kind(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.kind(node)
        self.generic_visit(node)


@functools.cache
def syntax_trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in Path(retool_jax.__file__).parent.rglob("*.py")]


def unread_keys(run: type) -> set[tuple[str, str]]:
    sections = sections_of(run)
    readers = Readers(sections | {"Run": run} | ({"EngineRun": run} if issubclass(run, EngineRun) else {}))
    trees = syntax_trees()
    for _ in range(3):  # until what classes keep of a config is known to those that use them
        for tree in trees:
            readers.names = {}
            readers.visit(tree)
    classes = {cls for section in sections.values() for cls in section.__mro__ if dataclasses.is_dataclass(cls)}
    return {(cls.__name__, name) for cls in classes for name in vars(cls)["__annotations__"]} - readers.read


@dataclass(frozen=True, config=CHECKED)
class Unused(CheckpointConfig):
    """`group_size` is read, but of another section; `nobody` is not."""

    group_size: int = 8
    nobody: int = 1


@dataclass(frozen=True, config=CHECKED)
class RunWithUnusedKeys(RLRun):
    checkpoint: Unused = Unused()


def test_every_key_has_a_reader_and_one_without_is_found():
    assert unread_keys(SFTRun) == unread_keys(EvaluateRun) == unread_keys(ServeRun) == set()
    # That of RL with two keys more.
    assert unread_keys(RunWithUnusedKeys) == {("Unused", "group_size"), ("Unused", "nobody")}


def test_mesh_axes_are_those_of_the_config():
    """These fields are read by name, in a loop."""
    assert tuple(typing.get_type_hints(MeshConfig)) == (*AXES, "name")
