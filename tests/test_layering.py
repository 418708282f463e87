"""Imports point one way, heavy libraries stay in the rooms that need them: both rules as tables over all modules."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

ROOMS = {
    "megakernel": ["megakernel.*"],
    "errors": ["pipecat_qwen3", "pipecat_qwen3.errors", "pipecat_qwen3.exits"],
    "backend": ["pipecat_qwen3.backend"],
    "config": ["pipecat_qwen3.config", "pipecat_qwen3.files", "pipecat_qwen3.hub"],
    "model": [
        "pipecat_qwen3.checkpoint",
        "pipecat_qwen3.code_predictor",
        "pipecat_qwen3.codec",
        "pipecat_qwen3.codec_*",
        "pipecat_qwen3.decoder_layer",
        "pipecat_qwen3.prompt",
        "pipecat_qwen3.talker",
        "pipecat_qwen3.text",
    ],
    "engine": [
        "pipecat_qwen3.delivery",
        "pipecat_qwen3.engine",
        "pipecat_qwen3.utterance",
        "pipecat_qwen3.words",
    ],
    "local": ["pipecat_qwen3.device", "pipecat_qwen3.local"],
    "protocol": ["pipecat_qwen3.protocol"],
    "remote": ["pipecat_qwen3.remote"],
    "service": ["pipecat_qwen3.playback", "pipecat_qwen3.service", "pipecat_qwen3.service_*"],
    "websocket service": ["pipecat_qwen3.websocket_service"],
    "server": [
        "pipecat_qwen3.server",
        "pipecat_qwen3.server_*",
        "pipecat_qwen3.audio_formats",
        "pipecat_qwen3.metrics",
    ],
    "cluster": ["pipecat_qwen3.cluster"],
    "cli": ["pipecat_qwen3.__main__", "pipecat_qwen3.cli_*", "pipecat_qwen3.doctor"],
    "bench": ["bench.*"],
    "bots": ["bots.*"],
    "training": ["training.*"],
}
"""Every module belongs to one room."""

MAY_IMPORT = {
    "megakernel": [],
    "errors": [],
    "backend": ["errors"],
    "config": ["errors", "megakernel"],
    "model": ["errors", "backend", "config", "megakernel"],
    "engine": ["errors", "backend", "config", "model", "megakernel"],
    "local": ["errors", "backend", "config", "model", "engine", "megakernel"],
    "protocol": ["errors", "backend"],
    "remote": ["errors", "backend", "protocol"],
    "service": ["errors", "backend"],
    "websocket service": ["errors", "backend", "protocol", "remote", "service"],
    "server": ["errors", "backend", "protocol"],
    "cluster": ["errors", "backend", "local", "server"],
    "cli": ["errors", "backend", "config", "model", "local", "service", "server", "cluster", "megakernel"],
    "bench": [
        *("errors", "backend", "config", "model", "engine", "local", "service", "remote", "protocol", "megakernel"),
        "websocket service",
    ],
    "bots": ["errors", "backend", "local", "service", "websocket service"],
    "training": ["errors", "backend", "config", "model", "local", "megakernel"],
}
"""What a room may import besides itself. Nothing imports bench, bots, training or tests."""

ON_FIRST_USE = {
    "pipecat_qwen3": [
        *("pipecat_qwen3.backend", "pipecat_qwen3.local", "pipecat_qwen3.remote"),
        *("pipecat_qwen3.service", "pipecat_qwen3.websocket_service"),
    ],
    "pipecat_qwen3.service": ["pipecat_qwen3.local"],
}
"""Imports inside functions (or for type checkers alone) that the arrows above do not have."""

LIBRARIES = {
    "torch": ["megakernel.*", *ROOMS["model"], *ROOMS["engine"], *ROOMS["local"], "pipecat_qwen3.doctor"],
    "transformers": ["pipecat_qwen3.checkpoint", "pipecat_qwen3.text"],
    "safetensors": ["pipecat_qwen3.checkpoint"],
    "huggingface_hub": ["pipecat_qwen3.hub"],
    "pipecat": [*ROOMS["service"], *ROOMS["websocket service"], "pipecat_qwen3.cli_speech"],
    "pydantic": ["pipecat_qwen3.protocol", "pipecat_qwen3.remote", *ROOMS["server"]],
    "websockets": ["pipecat_qwen3.remote"],
    "fastapi": ["pipecat_qwen3.server", "pipecat_qwen3.cluster"],
    "starlette": [*ROOMS["server"]],
    "uvicorn": ["pipecat_qwen3.server_run", "pipecat_qwen3.server_wire"],
    "prometheus_client": ["pipecat_qwen3.metrics"],
    "av": ["pipecat_qwen3.audio_formats"],
    "ray": ["pipecat_qwen3.cluster"],
    "loguru": ["pipecat_qwen3.service", "pipecat_qwen3.service_speech", "pipecat_qwen3.__main__"],
    "rich": ["pipecat_qwen3.cli_progress"],
    "triton": ["pipecat_qwen3.codec_kernels"],
    "cuda": ["megakernel.gpu", "megakernel.nvrtc"],
    "qwen_tts": [],
}
"""The modules of the two packages that may import a library; megakernel.shape is pinned separately."""


class Import(NamedTuple):
    importer: str
    imported: str
    late: bool

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}" + (" (late)" if self.late else "")


def modules() -> dict[str, Path]:
    found = {}
    for package in ("megakernel", "pipecat_qwen3", "bench", "bots", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, tree: ast.Module) -> Iterator[Import]:
    late: set[ast.AST] = set()
    for node in ast.walk(tree):
        only_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if only_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node in late)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute here"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(name, whole if whole in MODULES else node.module, node in late)


IMPORTS = [found for name, path in MODULES.items() for found in imports(name, ast.parse(path.read_text()))]


def matches(module: str, patterns: list[str]) -> bool:
    for pattern in patterns:
        start = pattern.removesuffix("*")
        if module == pattern or (pattern.endswith("*") and (module + ".").startswith(start)):
            return True
    return False


def room(module: str) -> str:
    found = [name for name, patterns in ROOMS.items() if matches(module, patterns)]
    assert len(found) == 1, f"{module} belongs to {found or 'no room'}; give it one in tests/test_layering.py"
    return found[0]


def test_every_module_has_a_room() -> None:
    assert len(MODULES) > 20
    assert {room(module) for module in MODULES} <= set(MAY_IMPORT)


def test_imports_point_one_way() -> None:
    wrong = []
    for found in IMPORTS:
        if found.imported.split(".")[0] == "tests":
            wrong.append(str(found))
        if found.imported not in MODULES or found.imported == "pipecat_qwen3":
            continue  # a library, or the package for its version and first-use names
        here, there = room(found.importer), room(found.imported)
        on_first_use = found.late and found.imported in ON_FIRST_USE.get(found.importer, [])
        if here != there and there not in MAY_IMPORT[here] and not on_first_use:
            wrong.append(str(found))
    assert not wrong


def test_no_module_imports_itself_round_a_corner() -> None:
    ways: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        if found.imported in MODULES and not found.late and found.imported != "pipecat_qwen3":
            ways[found.importer].add(found.imported)
    while leaves := [name for name, to in ways.items() if not to]:
        for leaf in leaves:
            del ways[leaf]
        for to in ways.values():
            to.difference_update(leaves)
    assert not ways


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_heavy_library_is_imported_only_where_it_is_needed(library: str) -> None:
    users = {found.importer for found in IMPORTS if found.imported.split(".")[0] == library}
    ours = {user for user in users if user.split(".")[0] in ("megakernel", "pipecat_qwen3")}
    assert not [user for user in sorted(ours) if not matches(user, LIBRARIES[library])]


def test_the_sizes_need_no_torch() -> None:
    assert "torch" not in {found.imported.split(".")[0] for found in IMPORTS if found.importer == "megakernel.shape"}


HEAVY = ("torch", "transformers", "pipecat", "huggingface_hub", "safetensors", "rich", "av", "ray")


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("pipecat_qwen3", set()),
        ("pipecat_qwen3.errors", set()),
        ("pipecat_qwen3.backend", set()),
        ("pipecat_qwen3.config", set()),
        ("pipecat_qwen3.hub", set()),
        ("pipecat_qwen3.__main__", set()),
        ("pipecat_qwen3.service", {"pipecat"}),
        ("pipecat_qwen3.websocket_service", {"pipecat"}),
        ("pipecat_qwen3.remote", set()),
        ("pipecat_qwen3.server", set()),
        ("pipecat_qwen3.local", {"torch", "safetensors"}),
    ],
)
def test_importing_a_module_loads_no_more_than_it_must(module: str, allowed: set[str]) -> None:
    program = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(done.stdout.split()) <= allowed


def test_the_names_of_the_package_are_those_it_promises() -> None:
    import pipecat_qwen3

    for name in pipecat_qwen3.__all__:
        assert getattr(pipecat_qwen3, name).__name__ == name
