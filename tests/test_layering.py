"""Imports go one way, by reading every source file: kernels and errors lowest, tools highest, no sideways steps."""

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {"megacpt": "megacpt", "kernels": "megacpt_kernels", "tools": "tools"}  # folder -> name it is imported by
LAYERS = (
    ("megacpt_kernels",),
    ("megacpt.errors",),
    ("megacpt.files",),
    ("megacpt.config",),
    ("megacpt.runtime",),
    ("megacpt.data", "megacpt.model"),
    ("megacpt.eval",),
    ("megacpt.train",),
    ("megacpt.bench", "megacpt.env", "megacpt.report"),
    ("tools",),
)
DATA = ("keyed", "text", "tokens", "scores", "subset", "mixture", "samples")
"""What stands in megacpt/data, in the order in which data flows."""
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
OPTIONAL = {
    "accelerate",
    "apex",
    "flash_attn",
    "gigatoken",
    "gguf",
    "kenlm",
    "liger_kernel",
    "lm_eval",
    "matplotlib",
    "pyhpo",
    "ray",
    "transformer_engine",
    "transformers",
    "wandb",
}
PROCESS_GROUPS = ("torch.distributed", "megatron.core.parallel_state", "megatron.core.mpu")


class Import(NamedTuple):
    module: str  # the file that imports
    target: str  # dotted, as far as it is written: `from a import b` is a.b
    line: int
    when: str  # "import" (as the file loads), "guarded" (in a try), "call" (in a function), "typing"

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path, root: Path) -> str:
    folder, *rest = path.relative_to(root).with_suffix("").parts
    parts = [ROOTS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named_modules(node: ast.AST, package: str) -> list[str]:
    """What an import statement, or a use of torch.distributed, names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return ["torch.distributed"] if node.attr == "distributed" else []
    return []


def walk(node: ast.AST, when: str = "import") -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        inner = when
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "call"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = "typing"
        elif isinstance(child, ast.Try) and when == "import":
            inner = "guarded"
        yield child, inner
        yield from walk(child, inner)


def read_imports(root: Path) -> dict[str, list[Import]]:
    """Module name -> its imports, for every file under the three source folders of `root`."""
    paths = [path for folder in ROOTS for path in sorted((root / folder).rglob("*.py"))]
    found = {}
    for path in paths:
        module = module_name(path, root)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = [
            Import(module, target, getattr(node, "lineno", 0), when)
            for node, when in walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
            for target in named_modules(node, package)
        ]
    return found


def part_of(module: str) -> str | None:
    """The layer that a module of ours belongs to; None for everybody else's."""
    parts = module.split(".")
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in HEIGHT), None)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def upward_or_sideways(imports: dict[str, list[Import]]) -> list[str]:
    wrong = []
    for entry in (entry for entries in imports.values() for entry in entries):
        here, there = part_of(entry.module), part_of(entry.target)
        if entry.module == "megacpt" and there:
            wrong.append(f"{entry}: megacpt/__init__.py stands below every layer")
        elif here and there and here != there and HEIGHT[there] >= HEIGHT[here]:
            wrong.append(f"{entry}: {there} is not below {here}")
        elif here == "tools" and (there == "tools" or f"tools.{entry.target}" in imports):
            wrong.append(f"{entry}: a tool imports no other tool")
    return wrong


def data_flows_back(imports: dict[str, list[Import]]) -> list[str]:
    wrong = []
    for entry in (entry for entries in imports.values() for entry in entries):
        here, there = (module.split(".")[2:3] for module in (entry.module, entry.target))
        both = within(entry.module, "megacpt.data") and within(entry.target, "megacpt.data")
        known = [DATA.index(name) for name in (*here, *there) if name in DATA]
        if both and len(known) == 2 and known[1] > known[0]:
            wrong.append(f"{entry}: {there[0]} comes after {here[0]}")
    return wrong


def kernels_know_us(imports: dict[str, list[Import]]) -> list[str]:
    entries = (e for m, found in imports.items() if within(m, "megacpt_kernels") for e in found)
    return [str(e) for e in entries if within(e.target, "megacpt") or within(e.target, "megatron")]


def data_knows_process_groups(imports: dict[str, list[Import]]) -> list[str]:
    entries = (e for m, found in imports.items() if within(m, "megacpt.data") for e in found)
    return [str(e) for e in entries if any(within(e.target, name) for name in PROCESS_GROUPS)]


def data_files_that_load_torch(imports: dict[str, list[Import]]) -> list[str]:
    """All but one: the file that makes batches may."""
    loading = [
        module
        for module, entries in imports.items()
        if within(module, "megacpt.data") and any(within(e.target, "torch") and e.when == "import" for e in entries)
    ]
    return loading if len(loading) > 1 else []


def redirection_outside_a_function(imports: dict[str, list[Import]]) -> list[str]:
    entries = (e for found in imports.values() for e in found if e.when in ("import", "guarded"))
    return [str(e) for e in entries if within(e.target, "megacpt.runtime.cpu")]


def optional_packages_at_load(imports: dict[str, list[Import]]) -> list[str]:
    entries = (e for found in imports.values() for e in found if e.when == "import")
    return [str(e) for e in entries if e.target.split(".")[0] in OPTIONAL]


def cycles(imports: dict[str, list[Import]]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for module, entries in imports.items():
        targets = {e.target if e.target in imports else e.target.rpartition(".")[0] for e in entries}
        graph[module] = (targets & imports.keys()) - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


Rule = Callable[[dict[str, list[Import]]], list[str]]
RULES: list[Rule] = [
    upward_or_sideways,
    data_flows_back,
    kernels_know_us,
    data_knows_process_groups,
    data_files_that_load_torch,
    redirection_outside_a_function,
    optional_packages_at_load,
    cycles,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_sources_keep_the_rule(rule: Rule) -> None:
    imports = read_imports(REPOSITORY)
    assert len(imports) > 5
    assert rule(imports) == []


def test_every_source_file_belongs_to_a_layer() -> None:
    modules = read_imports(REPOSITORY)
    assert [module for module in modules if module != "megacpt" and not part_of(module)] == []
    inside = [module.split(".")[2] for module in modules if module.startswith("megacpt.data.")]
    assert set(inside) == set(DATA)


BREACHES: list[tuple[Rule, dict[str, str]]] = [
    (upward_or_sideways, {"megacpt/config/a.py": "from megacpt.runtime import b"}),
    (upward_or_sideways, {"megacpt/data/a.py": "def f():\n    import megacpt.model.b"}),
    (upward_or_sideways, {"megacpt/files.py": "from .eval.b import c"}),
    (upward_or_sideways, {"megacpt/__init__.py": "from megacpt.errors import UserError"}),
    (upward_or_sideways, {"megacpt/errors.py": "from megacpt import files"}),
    (upward_or_sideways, {"tools/a.py": "import b", "tools/b.py": ""}),
    (data_flows_back, {"megacpt/data/text/a.py": "from megacpt.data.tokens.b import c"}),
    (data_flows_back, {"megacpt/data/subset/a.py": "def f():\n    import megacpt.data.mixture.b"}),
    (kernels_know_us, {"kernels/a.py": "from megacpt.errors import UserError"}),
    (kernels_know_us, {"kernels/a.py": "def f():\n    import megatron.core"}),
    (data_knows_process_groups, {"megacpt/data/a.py": "import torch\nx = torch.distributed.get_rank"}),
    (data_knows_process_groups, {"megacpt/data/a.py": "from torch import distributed"}),
    (data_knows_process_groups, {"megacpt/data/a.py": "from megatron.core import parallel_state"}),
    (data_files_that_load_torch, {"megacpt/data/a.py": "import torch", "megacpt/data/b.py": "from torch import nn"}),
    (redirection_outside_a_function, {"megacpt/runtime/a.py": "from megacpt.runtime.cpu import redirected"}),
    (redirection_outside_a_function, {"megacpt/runtime/a.py": "from . import cpu"}),
    (optional_packages_at_load, {"megacpt/model/a.py": "import transformer_engine.pytorch as te"}),
    (cycles, {"megacpt/data/a.py": "from megacpt.data import b", "megacpt/data/b.py": "from megacpt.data.a import c"}),
]

ALLOWED = {
    "megacpt/errors.py": "",
    "megacpt/runtime/cpu.py": "from megacpt.errors import UserError",
    "megacpt/runtime/start.py": "import torch.distributed\ndef f():\n    from megacpt.runtime import cpu",
    "megacpt/data/samples/batches.py": "import torch\nfrom megacpt.errors import UserError",
    "megacpt/data/other.py": "def f():\n    import torch",
    "megacpt/model/spec.py": "try:\n    import apex\nexcept ImportError:\n    apex = None\nimport megacpt_kernels.a",
    "kernels/a.py": "import triton",
    "tools/a.py": "import megacpt\nfrom megacpt.train import b",
}


def written(root: Path, files: dict[str, str]) -> dict[str, list[Import]]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return read_imports(root)


@pytest.mark.parametrize(("rule", "files"), BREACHES)
def test_a_breach_is_seen(tmp_path: Path, rule: Rule, files: dict[str, str]) -> None:
    assert rule(written(tmp_path, files)) != []


def test_what_is_allowed_is_not_refused(tmp_path: Path) -> None:
    imports = written(tmp_path, ALLOWED)
    assert {rule.__name__: rule(imports) for rule in RULES} == {rule.__name__: [] for rule in RULES}
