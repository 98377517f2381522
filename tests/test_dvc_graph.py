"""dvc.yaml against the code: each stage depends on exactly the files and parameters it uses."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.frame.params import EvaluateConfig, Params
from tests.forked import dvc

ROOT = Path(__file__).resolve().parents[1]
FIRST_PARTY = ("stages", "data_pipeline", "model", "kernels")
# The frame around every stage: it checks parameters, words errors and keeps compiled code, and changes no result.
WORKER = ROOT / "stages/frame/worker.py"
FRAME = {
    *ROOT.glob("stages/frame/*.py"),
    ROOT / "data_pipeline/text/__init__.py",
    ROOT / "data_pipeline/config.py",
    ROOT / "model/compression/config.py",
}
STAGES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items()
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names a module may import, wherever the statement stands, except for type checkers alone."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom) and tree.module:
        assert tree.level == 0, "first-party imports are absolute"
        yield tree.module
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    for child in ast.iter_child_nodes(tree):
        yield from imports(child)


def files_of(module: str) -> Iterator[Path]:
    """The module's own file and the __init__ files of its packages, where there are any."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:end])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                yield file


@cache
def imported_by(file: Path) -> list[Path]:
    """First-party files that the file's own statements import."""
    return [path for name in imports(ast.parse(file.read_text())) if name.split(".")[0] in FIRST_PARTY
            for path in files_of(name)]


def closure(file: Path) -> set[Path]:
    """First-party files that running `file` may execute, the frame and empty files left out."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        file = waiting.pop()
        if file in found or file in FRAME:
            continue
        found.add(file)
        waiting += imported_by(file)
    return {file for file in found if not only_a_docstring(file)}


def job_of(stage: str) -> set[Path]:
    """What a stage that runs a job executes there: of `stages.frame.worker` the function of its task."""
    if "stage.run_job(" not in stage_file(stage).read_text():
        return set()
    tasks = [node for node in ast.parse(WORKER.read_text()).body
             if isinstance(node, ast.FunctionDef) and node.name == stage]
    assert len(tasks) == 1
    return {file for name in imports(tasks[0]) if name.split(".")[0] in FIRST_PARTY for path in files_of(name)
            for file in closure(path)}


@cache
def only_a_docstring(file: Path) -> bool:
    body = ast.parse(file.read_text()).body
    return all(isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) for statement in body)


def code_dependencies(stage: str) -> list[Path]:
    return [ROOT / path for path in STAGES[stage]["deps"] if path.split("/")[0] in FIRST_PARTY]


def stage_file(stage: str) -> Path:
    file = ROOT / f"stages/{stage}.py"
    file = file if file.exists() else ROOT / f"stages/{stage}/__main__.py"
    assert STAGES[stage]["cmd"].split()[:3] == ["python", "-m", f"stages.{stage}"]
    return file


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_files_the_stage_imports(stage: str) -> None:
    used = closure(stage_file(stage)) | job_of(stage)
    declared = code_dependencies(stage)

    def show(files: set[Path]) -> list[str]:
        return sorted(str(file.relative_to(ROOT)) for file in files)

    not_declared = {file for file in used if not any(file.is_relative_to(path) for path in declared)}
    assert not show(not_declared), f"dvc.yaml, {stage}: imported, but not in deps"
    modules = {path for path in declared if path.is_dir() or path.suffix == ".py"} - FRAME
    not_used = {path for path in modules if not any(file.is_relative_to(path) for file in used)}
    assert not show(not_used), f"dvc.yaml, {stage}: in deps, but not imported"
    assert all(path.exists() for path in declared)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_the_sections_the_stage_declares_and_reads(stage: str) -> None:
    tree = ast.parse(stage_file(stage).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_stage"]
    assert len(calls) == 1
    arguments = dict(zip(("function", "description", "sections"), calls[0].args, strict=False))
    arguments |= {str(keyword.arg): keyword.value for keyword in calls[0].keywords}
    sections = set(ast.literal_eval(arguments["sections"]))
    declared = {name.split(".")[0] for name in STAGES[stage]["params"]}
    assert sections == declared - {"profile"}, f"{stage}: sections=(...) against params in dvc.yaml"

    read = {
        node.attr
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("stage.params", "params")
    }
    if "model_of" in read:
        read |= {"model", "variants", "tokenizer"}
    assert read & set(Params.model_fields) - {"runtime"} <= declared | {"profile"}


def test_stages_that_compute_on_a_gpu_take_it() -> None:
    """And no others: `meta` in dvc.yaml is what the flow counts on."""
    taking = {name for name in STAGES if re.search(r"stage\.(take_gpus|run_job)\(", stage_file(name).read_text())}
    metas = {name: stage.get("meta", {}) for name, stage in STAGES.items()}
    assert taking == {name for name, meta in metas.items() if meta.get("gpus") or meta.get("exclusive")}


def test_closure_follows_imports_inside_functions_and_skips_the_frame() -> None:
    used = {str(file.relative_to(ROOT)) for file in closure(ROOT / "stages/tokenizer.py")}
    assert used == {"stages/tokenizer.py", "data_pipeline/tokenize/tokenizer.py", "data_pipeline/curated.py"}


def settings_read(function: str, file: Path, config: str = "config") -> set[str]:
    """Fields of `evaluate` that a function of `file` reads of its `config`, also by a property."""
    (found,) = (node for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.FunctionDef) and node.name == function)
    nodes = [node for node in ast.walk(found) if isinstance(node, ast.Attribute | ast.Subscript)
             and isinstance(node.value, ast.Name) and node.value.id == config]
    names = {node.attr if isinstance(node, ast.Attribute) else ast.literal_eval(node.slice) for node in nodes}
    fields = EvaluateConfig.model_fields.keys()
    return names & fields | {field for name in names - fields
                             for field in settings_read(name, ROOT / "stages/frame/params.py", "self")}


@pytest.mark.parametrize(("stage", "file"), [
    ("items", ROOT / "stages/items.py"), ("reference", ROOT / "stages/reference.py"), ("evaluate", WORKER)])
def test_of_evaluate_a_stage_depends_on_what_it_reads(stage: str, file: Path) -> None:
    """Else what the reference is asked, or what is written, would make every model be asked anew."""
    assert {f"evaluate.{name}" for name in settings_read(stage, file)} == {
        name for name in STAGES[stage]["params"] if name.startswith("evaluate")}
    assert settings_read("items", ROOT / "stages/items.py") >= {"items_per_task"}


def test_a_threshold_reruns_the_cut_and_not_the_annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DVC sees it, in a repository whose lock says that both stages ran."""
    monkeypatch.chdir(tmp_path)
    for name in ("stages", "data_pipeline", "model", "kernels", "requirements.lock"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    yaml = YAML()
    stages = yaml.load(ROOT / "dvc.yaml")["stages"]
    yaml.dump({"stages": {name: stages[name] for name in ("sources", "annotate", "curate")}}, tmp_path / "dvc.yaml")
    for stage in ("sources", "annotate", "curate"):
        for out in [*STAGES[stage]["outs"], *STAGES[stage]["metrics"]]:
            path = tmp_path / out.replace("${profile}", "cpu")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")

    dvc("init", "--no-scm")
    dvc("commit", "--force", "--quiet")
    assert json.loads(dvc("status", "--json")) == {"sources": ["always changed"]}
    params = yaml.load(tmp_path / "params.yaml")
    params["curate"]["rules"]["docs"]["thresholds"] = {"words": [50, None]}
    params["curate"]["perplexity"]["share"] = 0.1
    params["runtime"]["workers"] = 64
    yaml.dump(params, tmp_path / "params.yaml")
    assert set(json.loads(dvc("status", "--json"))) == {"sources", "curate"}


def test_every_stage_depends_on_the_libraries_that_are_locked() -> None:
    assert all("requirements.lock" in stage["deps"] for stage in STAGES.values())
