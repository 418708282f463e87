"""What the documents name exists: metrics of the dashboard and of the advice, files, make targets, options."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "megakernel/README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
)


def exported() -> set[str]:
    metrics = pytest.importorskip("pipecat_qwen3.metrics", reason="needs the extra [server]").Metrics()
    metrics.ends.labels("eos").inc()
    metrics.errors.labels("internal").inc()
    return set(re.findall(r"^(pipecat_qwen3_\w+)", metrics.text().decode(), re.M))


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"pipecat_qwen3_\w+", query)}
    assert len(named) >= 8
    assert named <= exported()


def test_documents_name_metrics_that_there_are() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    named = set(re.findall(r"\bpipecat_qwen3_[a-z_]+", text))
    assert named
    assert named <= exported() | {name.removesuffix("_bucket") for name in exported()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_are_there(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"`((?:docs|bench|bots|tests|training|megakernel|pipecat_qwen3)/[\w./-]+\.\w+)`", text))
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    missing = {name for name in named if not (ROOT / name).exists()} | {
        x for x in links if not (path.parent / x).exists()
    }
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_and_modules_that_a_document_names_are_there(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    for module in re.findall(r"python -m ((?:bench|training|tests|megakernel|bots)\.[a-z_]+)", text):
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists(), module


def test_options_that_the_documents_give_to_serve_are_there() -> None:
    pytest.importorskip("fastapi", reason="needs the extra [server]")
    listed = subprocess.run(
        [sys.executable, "-m", "pipecat_qwen3", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for path in DOCUMENTS:
        for command in re.findall(r"pipecat-qwen3 serve((?:(?: |\\\n)+[-/\w.]+)*)", path.read_text()):
            for option in re.findall(r"--[a-z-]+", command):
                assert option in listed, f"{path.name}: {option}"
