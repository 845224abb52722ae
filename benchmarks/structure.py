"""The size and shape of the package: lines, modules, import closures, small modules, helpers used once, record types.

Run with `python benchmarks/structure.py [FOLDER]`; FOLDER holds the package `segkit` (default: this checkout), so that
two checkouts can be compared. `--json` prints one JSON document, `--list` names what is counted.

* closure: all modules of segkit that an import of the module may load, imports inside functions included, those for
  type checking alone excluded.
* small: a module of less than 60 lines that one other module imports. Files listed in a visible table (verbs, layouts,
  networks, methods, protocols) are exempt.
* used once: a private function that is named in exactly one place besides its definition.
* records: classes that are dataclasses, named tuples, typed dictionaries or pydantic models.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from pathlib import Path

import grimp

CLOSURES = ("segkit.cli.train", "segkit.cli.infer")
SMALL_LINES, FILE_LINES, FUNCTION_LINES = 60, 400, 60
TABLES = ("segkit.cli", "segkit.reading.layouts", "segkit.models", "segkit.metrics", "segkit.pretraining.methods")
"""Packages and modules that list files in a table: their entries are found from there."""
RECORD_BASES = {"NamedTuple", "TypedDict", "BaseModel", "Config"}
BY_STRING = {"import_module", "__import__"}


def closure(graph: grimp.ImportGraph, start: str) -> set[str]:
    """The modules that an import of `start` may load, itself included."""
    found, waiting = {start}, [start]
    while waiting:
        for module in graph.find_modules_directly_imported_by(waiting.pop()) - found:
            found.add(module)
            waiting.append(module)
    return found


def is_record(node: ast.ClassDef, records: set[str]) -> bool:
    """Whether a class is a dataclass, or derives from a record."""
    decorators = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
    return any(ast.unparse(one).endswith("dataclass") for one in decorators) or bool(bases & (RECORD_BASES | records))


def measure(folder: Path) -> dict[str, object]:
    """All figures of the package below `folder`."""
    sys.path.insert(0, str(folder))
    paths = sorted((folder / "segkit").rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    graph = grimp.build_graph("segkit", exclude_type_checking_imports=True, cache_dir=None)
    modules = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path for path in paths
    }

    def is_listed(module: str) -> bool:
        importers = graph.find_modules_that_directly_import(module)
        package = module.rpartition(".")[0]
        is_table = importers <= {
            *TABLES,
            *(f"{table}.table" for table in TABLES),
            *(f"{table}.protocols" for table in TABLES),
        }
        return module.startswith("segkit.cli.") or (package in TABLES and is_table) or importers <= set(TABLES)

    small = [
        module
        for module, path in modules.items()
        if lines[path] < SMALL_LINES
        and path.name != "__init__.py"
        and len(graph.find_modules_that_directly_import(module)) == 1
        and not is_listed(module)
    ]
    names = Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
    )
    functions = [
        (path, node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    private = [node for _, node in functions if node.name.startswith("_") and not node.name.startswith("__")]
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    records: set[str] = set()
    while (more := {node.name for node in classes if is_record(node, records)}) != records:
        records = more
    long_functions = [
        f"{path.relative_to(folder)}:{node.lineno} {node.name} ({node.end_lineno - node.lineno + 1})"
        for path, node in functions
        if (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES
    ]
    by_string = [
        f"{path.relative_to(folder)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in BY_STRING
    ]
    sizes = sorted(lines.values())
    return {
        "lines": sum(sizes),
        "modules": len(graph.modules),
        "median lines of a file": sizes[len(sizes) // 2],
        **{f"closure of {start}": len(closure(graph, start)) for start in CLOSURES},
        "small modules with one importer": sorted(small),
        "private functions": len(private),
        "private functions used once": sorted(node.name for node in private if names[node.name] == 1),
        "record types": sorted(records),
        "files over 400 lines": [f"{p.relative_to(folder)} ({n})" for p, n in lines.items() if n > FILE_LINES],
        "functions over 60 lines": long_functions,
        "imports by string": by_string,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true", help="name what is counted")
    arguments = parser.parse_args()
    figures = measure(arguments.folder.resolve())
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:36s} {len(value) if isinstance(value, list) else value}")
        if arguments.list and isinstance(value, list):
            print("".join(f"    {entry}\n" for entry in value), end="")


if __name__ == "__main__":
    main()
