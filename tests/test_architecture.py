"""House rules that a reader relies on: imports point one way, help answers at once, functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.processes import help_answers_at_once, imported_modules

FLOORS = (  # from the ground up: a package imports from the floors below its own, never from its own or from above
    (
        "errors",
        "jsonio",
        "threads",
        "cluster",
        "libraries",
        "options",
        "images",
        "image_files",
        "language",
        "replies",
    ),
    ("storage",),
    ("shards", "faces", "models", "serving", "check", "captioned"),
    ("tar",),
    ("run", "edits"),
    ("download", "rewrite", "generate", "reshard", "caption", "extract", "publish"),
    ("backends",),
    ("commands", "__main__"),
)
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}
GROUND = FLOORS[0]  # single modules, which may import one another
MOST_MODULES, MOST_AT_THE_TOP = 16, 14
# Where a module is imported by a name that is only known at run time, and which one that is.
DYNAMIC_IMPORTS = {
    "curation/__main__.py": "the command that was asked for",
    "curation/backends/__init__.py": "the model that was asked for",
    "curation/backends/llm/embedded.py": "the package that carries the language model",
    "curation/backends/caption/torchless.py": "classes of transformers that need torchvision",
    "curation/commands/stages.py": "a stage's script by its path",
    "curation/extract/plugins.py": "a user's file of extractors",
    "curation/libraries.py": "numpy and the like when they are first used",
    "curation/errors.py": "packages, to see whether they can be imported, by names that backends declare",
    "curation/models/hub_cache.py": "bitsandbytes, which fails in its own ways",
}
LOADERS = ("importlib", "runpy", "pkgutil", "zipimport", "imp", "builtins")  # they import what no statement names …
HARMLESS = (
    "importlib.util.find_spec",
    "importlib.metadata",
    "importlib.resources",
    "importlib.machinery.ModuleSpec",
)  # … but for these
HEAVY = ("torch", "onnxruntime", "onnx", "diffusers", "transformers", "accelerate", "insightface", "cv2", "xllamacpp")
# A run that finds nothing to do, and --help, need none of these either: they are large, or read all packages there are.
UNUSED = ("numpy", "PIL", "simplejpeg", "requests", "urllib3", "yaml", "pyarrow", "boto3", "botocore", "fsspec")
MAX_FUNCTION_LINES = 70


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def import_statements(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that a statement anywhere in the file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """``a.b.c`` for each name with its attributes that the file reads, as long as it is."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            base: ast.AST = node
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name):
                yield ast.unparse(node)


def dynamic_imports(tree: ast.AST) -> set[str]:
    """Whatever imports a module by a name or path that no import statement holds, under whatever name it is used."""
    means = {"__import__": "builtins.__import__", "__builtins__": "builtins"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top in LOADERS:
                    means[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LOADERS:
            means |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.*" for alias in node.names if alias.name == "*"}
    for name in dotted_names(tree):
        base, dot, rest = name.partition(".")
        full = f"{means[base]}{dot}{rest}" if base in means else ""
        if full and not any(f"{full}.".startswith(f"{harmless}.") for harmless in HARMLESS):
            found.add(full)
    return found


class House:
    """The scripts and the package below one folder, and who imports whom."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scripts = sorted(root.glob("[0-9][0-9]_*.py"))
        self.modules = sorted((root / "curation").rglob("*.py"))
        self.programs = [*self.scripts, *self.modules]
        self.names = {self.name_of(module) for module in self.modules}

    def name_of(self, path: Path) -> str:
        """``curation/backends/faces/scrfd.py`` → ``backends.faces.scrfd``; the package itself is ``""``."""
        parts = path.relative_to(self.root / "curation").with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")

    def own_imports(self, path: Path) -> set[str]:
        """The project's modules that a file imports, or reaches through ``import curation``, by ``name_of``."""
        tree, found = parse(path), set()
        for name in (*import_statements(tree), *dotted_names(tree)):
            parts = name.split(".")
            if parts[0] == "curation":
                while parts and ".".join(parts[1:]) not in self.names:
                    parts.pop()
                found.add(".".join(parts[1:]))
        return found - {"", self.name_of(path) if path in self.modules else ""}

    def wrong_ways(self, path: Path) -> Iterator[str]:
        """What a module imports that is not on a floor below its own, nor in its own package."""
        mine = package_of(self.name_of(path))
        if not mine:
            return
        assert mine in FLOOR, f"curation/{mine} is on no floor: add it to FLOORS"
        for name in sorted(self.own_imports(path)):
            theirs = package_of(name)
            inside = theirs == mine or (mine in GROUND and theirs in GROUND)
            if not inside and FLOOR[theirs] >= FLOOR[mine]:
                yield name

    def scripts_imported(self, path: Path) -> set[str]:
        stems = {script.stem for script in self.scripts}
        return stems & {name.split(".")[0] for name in import_statements(parse(path))}

    def circle(self) -> tuple[str, ...]:
        """Modules of which each imports the next, and the last the first; empty if there are none."""
        graph = {self.name_of(path): self.own_imports(path) for path in self.modules}
        done: set[str] = set()

        def visit(name: str, trail: tuple[str, ...]) -> tuple[str, ...]:
            if name in trail:
                return trail[trail.index(name) :]
            if name not in done:
                for other in sorted(graph[name]):
                    if found := visit(other, (*trail, name)):
                        return found
                done.add(name)
            return ()

        return next(filter(None, (visit(name, ()) for name in graph)), ())


def package_of(name: str) -> str:
    return name.split(".")[0]


HOUSE = House(ROOT)
SCRIPTS, MODULES, PROGRAMS, name_of = HOUSE.scripts, HOUSE.modules, HOUSE.programs, HOUSE.name_of


def test_there_is_something_to_check() -> None:
    assert len(SCRIPTS) >= 4
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    """To a lower floor, or inside the own package.  Packages of one floor never import one another."""
    assert list(HOUSE.wrong_ways(path)) == []


def test_scripts_import_no_command() -> None:
    for script in SCRIPTS:
        reached = {name for name in HOUSE.own_imports(script) if package_of(name) in FLOORS[-1]}
        assert not reached, f"{script.name} imports {sorted(reached)}"


def test_packages_are_of_a_size_that_can_be_read() -> None:
    """Folders of models have no bound: a model more is a file more."""
    folders = {path.parent for path in MODULES} - {path.parent for path in MODULES if "backends" in path.parts}
    sizes = {folder: sum(module.parent == folder for module in MODULES) for folder in folders}
    assert sizes.pop(ROOT / "curation") <= MOST_AT_THE_TOP
    assert max(sizes.values()) <= MOST_MODULES, sizes


def test_every_package_says_what_it_is() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            assert len(ast.get_docstring(parse(path)) or "") > 60, f"{path.relative_to(ROOT)} defines no nouns"


def test_imports_by_a_name_of_run_time_are_known() -> None:
    """They go around the floors: each place is listed with its reason, and no script is among them."""
    found = {str(path.relative_to(ROOT)) for path in PROGRAMS if dynamic_imports(parse(path))}
    assert found == DYNAMIC_IMPORTS.keys()


def test_no_module_imports_itself_in_a_circle() -> None:
    assert HOUSE.circle() == ()


def test_nothing_imports_a_numbered_script() -> None:
    for path in PROGRAMS:
        assert HOUSE.scripts_imported(path) == set()


# ---- the rules find what breaks them


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("curation/run/a.py", "from curation.backends.faces import scrfd", ["backends.faces.scrfd"]),
        ("curation/run/a.py", "def f():\n    import curation.backends.faces.scrfd as s", ["backends.faces.scrfd"]),
        ("curation/caption/a.py", "from curation import rewrite", ["rewrite"]),
        ("curation/caption/a.py", "import curation\nx = curation.rewrite.prompts.x", ["rewrite.prompts"]),
        ("curation/caption/a.py", "if x:\n    from curation.rewrite.prompts import Prompt", ["rewrite.prompts"]),
        ("curation/edits.py", "from curation.run import runner", ["run.runner"]),
        ("curation/errors.py", "from curation.storage.files import x", ["storage.files"]),
        ("curation/errors.py", "from curation.jsonio import x", []),
        ("curation/run/a.py", "from curation.run.runner import x\nfrom curation.storage.files import y", []),
        ("curation/commands/a.py", "from curation.backends.faces import scrfd", []),
    ],
)  # fmt: skip
def test_an_import_the_wrong_way_is_found(path: str, text: str, found: list[str], tmp_path: Path) -> None:
    for name in ("backends/faces/scrfd", "rewrite/prompts", "run/runner", "storage/files", "jsonio", "edits", "errors"):
        for folder in (tmp_path / "curation" / name).relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder).mkdir(exist_ok=True, parents=True)
            (tmp_path / folder / "__init__.py").touch()
        (tmp_path / "curation" / f"{name}.py").touch()
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text)
    assert list(House(tmp_path).wrong_ways(tmp_path / path)) == found


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "curation").mkdir()
    for name, other in (("jsonio", "threads"), ("threads", "errors"), ("errors", "jsonio"), ("images", "errors")):
        (tmp_path / "curation" / f"{name}.py").write_text(f"from curation import {other}")
    assert set(House(tmp_path).circle()) == {"jsonio", "threads", "errors"}
    (tmp_path / "curation" / "errors.py").write_text("")
    assert House(tmp_path).circle() == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import importlib\nimportlib.import_module('02_x')", "importlib.import_module"),
        ("import importlib as i\ni.import_module('02_x')", "importlib.import_module"),
        ("from importlib import import_module as load\nload('02_x')", "importlib.import_module"),
        ("from importlib import import_module\nload = import_module", "importlib.import_module"),
        ("import importlib\nload = getattr(importlib, 'import_' + 'module')", "importlib"),
        ("import importlib.util\nimportlib.util.spec_from_file_location", "importlib.util.spec_from_file_location"),
        ("import importlib.util as u\nu.spec_from_file_location('x')", "importlib.util.spec_from_file_location"),
        ("from importlib import util\nutil.spec_from_file_location('x')", "importlib.util.spec_from_file_location"),
        ("from importlib.machinery import SourceFileLoader as S\nS('x', 'y')", "importlib.machinery.SourceFileLoader"),
        ("from importlib import *", "importlib.*"),
        ("__import__('02_x')", "builtins.__import__"),
        ("import builtins as b\nb.__import__('02_x')", "builtins.__import__"),
        ("def f():\n    from runpy import run_path as go\n    go('02_x.py')", "runpy.run_path"),
        ("import runpy\nrunpy.run_module('x')", "runpy.run_module"),
        ("import pkgutil\npkgutil.resolve_name('x:y')", "pkgutil.resolve_name"),
        ("import importlib.util\nimportlib.util.find_spec('x')", None),
        ("from importlib.util import find_spec\nfind_spec('x')", None),
        ("from importlib import metadata, resources\nmetadata.version('x'), resources.files('y')", None),
        ("import_module = 1\nprint(import_module)", None),
    ],
)  # fmt: skip
def test_an_import_by_a_name_of_run_time_is_found(text: str, found: str | None) -> None:
    assert dynamic_imports(ast.parse(text)) == ({found} if found else set())


# ---- what is imported when, and help


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    for node in parse(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            heavy = {name for name in import_statements(ast.Module([node], [])) if name.split(".")[0] in HEAVY}
            assert not heavy, f"{path.name}:{node.lineno} imports {sorted(heavy)} when it is itself imported"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_answers_in_under_a_second_and_loads_no_heavy_library(script: Path) -> None:
    said = help_answers_at_once(script)
    assert "--help" in said.stdout
    loaded = imported_modules(said.stderr)
    assert "curation" in loaded
    assert not loaded & {*HEAVY, *UNUSED}


def test_help_that_nobody_reads_to_its_end() -> None:
    command = f"{sys.executable} {ROOT / '05_recaption.py'} --help | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_small(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous(path: Path) -> None:
    """No bare except, no pickle, no eval or exec, no shell, no weights that are code."""
    tree = parse(path)
    assert not {name.split(".")[0] for name in import_statements(tree)} & {"pickle", "dill", "marshal", "shelve"}
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where} bare except"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "os.system", "os.popen"}, f"{where} {called}"
        for keyword in node.keywords:
            given = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            assert not (keyword.arg == "shell" and given is not False), f"{where} shell="
            assert not (keyword.arg == "weights_only" and given is not True), f"{where} weights_only="
            assert not (keyword.arg == "allow_pickle" and given is not False), f"{where} allow_pickle="
            assert not (keyword.arg == "trust_remote_code" and given is not False), f"{where} trust_remote_code="


def test_only_the_runner_loops_over_shards() -> None:
    """Scripts hand their shards to the runner; a second loop would be a second set of rules for errors and claims."""
    for script in SCRIPTS:
        for node in ast.walk(parse(script)):
            if isinstance(node, ast.For):
                assert ast.unparse(node.iter) not in {"shards", "self.shards", "sources"}, (
                    f"{script.name}:{node.lineno}"
                )
