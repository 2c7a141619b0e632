"""Checks of the code's own shape: layers, purity, lengths, installed names."""

import ast
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "emberfs"

# A layer may import the layers named here and itself, nothing else of ours.
LAYERS: dict[str, set[str]] = {
    "proto": set(),
    "runtime": {"proto"},
    "kv": {"proto", "runtime"},
    "fabric": {"proto", "runtime"},
    "client": {"proto", "runtime", "fabric"},
    "mgmtd": {"proto", "runtime", "fabric", "kv"},
    "storage": {"proto", "runtime", "fabric", "kv", "client"},
    "meta": {"proto", "runtime", "fabric", "kv", "client"},
    "deploy": {"proto", "runtime", "fabric", "kv", "client", "mgmtd", "storage", "meta"},
}

# Modules that hold protocol and no input or output.
PURE = {
    "mgmtd.quarrels",
    "storage.reach",
    "client.native.layout",
    "client.native.messages",
    "client.readahead",
    "client.kvcache.breaker",
    "client.kvcache.call",
    "client.kvcache.index",
    "client.kvcache.records",
    "client.kvcache.slots",
    "proto.bounds",
    "proto.ids",
    "proto.errors",
    "proto.cluster",
    "proto.files",
    "proto.batch_calls",
    "proto.method",
    "proto.rendezvous",
    "proto.storage_calls",
    "proto.meta_calls",
    "proto.quota_calls",
    "kv.keys",
    "deploy.fsck_equal",
    "fabric.frame",
    "mgmtd.chain",
    "mgmtd.election",
    "mgmtd.events",
    "mgmtd.membership",
    "mgmtd.placement",
    "meta.acl",
    "meta.attributes",
    "meta.check",
    "meta.check_trees",
    "meta.inode_xattrs",
    "meta.permission",
    "meta.schema",
    "runtime.retry",
    "storage.allocator",
    "storage.chunk_events",
    "storage.craq",
    "storage.readrule",
    "storage.records",
    "storage.hoporder",
    "storage.progress",
    "storage.redo",
    "storage.remembering",
    "storage.resync",
    "storage.scrubplan",
    "storage.target",
    "storage.view",
}
PURE_STDLIB = {
    "__future__",
    "bisect",
    "collections.abc",
    "collections",
    "dataclasses",
    "enum",
    "errno",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "stat",
    "struct",
    "typing",
    "zlib",
}
PURE_EXTERNAL = {"msgspec"}

LINES_PER_FUNCTION_MAX = 70
LINES_PER_FILE_MAX = 700

GENERATED = {"control_pb2.py", "control_pb2_grpc.py", "etcd_pb2.py", "etcd_pb2_grpc.py"}
SOURCES = sorted(
    p for layer in LAYERS for p in (ROOT / layer).rglob("*.py") if p.name not in GENERATED
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST, module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import at line {node.lineno}"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    layer = module.split(".")[0]
    for name in imported_modules(ast.parse(path.read_text()), module):
        if name.startswith(NAMESPACE + "."):
            other = name.split(".")[1]
            assert other == layer or other in LAYERS[layer], f"{module} may not import {name}"


def test_no_cycle_between_modules() -> None:
    modules = {module_name(path): path for path in SOURCES}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets: set[str] = set()
        for name in imported_modules(ast.parse(path.read_text()), module):
            parts = name.removeprefix(NAMESPACE + ".").split(".")
            for stop in (len(parts), len(parts) - 1):
                candidate = ".".join(parts[:stop])
                if candidate in modules and candidate != module:
                    targets.add(candidate)
                    break
        edges[module] = targets
    done: set[str] = set()
    while len(done) < len(modules):
        ready = {m for m in modules if m not in done and edges[m] <= done}
        assert ready, f"cycle among {sorted(set(modules) - done)}"
        done |= ready


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_module_does_no_io(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text())
    for name in imported_modules(tree, module):
        head = name.split(".")[0]
        if head == NAMESPACE:
            parts = name.split(".")
            found = {".".join(parts[1:3]), ".".join(parts[1:4])}
            assert found & PURE, f"{module} imports impure {name}"
        else:
            assert head in PURE_STDLIB | PURE_EXTERNAL, f"{module} imports {name}"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), f"{module} is async"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_lengths(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LINES_PER_FILE_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LINES_PER_FUNCTION_MAX, f"{node.name}: {lines} lines"


def test_no_generic_name_is_installed() -> None:
    top_level = (distribution(NAMESPACE).read_text("top_level.txt") or "").split()
    assert top_level == [NAMESPACE]
