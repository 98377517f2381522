"""The embedded corpus: closure, licences, docstrings and code of real installed files."""

import ast
import pickle
import sys
import sysconfig
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path

import pytest

from data_pipeline.config import DataError, InstalledSource
from data_pipeline.sources import Document, PassedOver, Refusal, digest, installed, pieces
from data_pipeline.sources.installed import SourceFile, closure, everything, installed_files, read_documents
from data_pipeline.sources.licenses import UNKNOWN, is_permissive, license_of
from data_pipeline.sources.python_source import docstring_pages, parse, without_docstrings

OSI = "License :: OSI Approved"
ALL = frozenset({"code", "docs", "headers", "reference"})
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def metadata(**fields: str | list[str]) -> Message:
    message = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("MPL-2.0 AND MIT", False),
        ("(MIT OR LGPL-2.1) AND (BSD-3-Clause OR GPL-2.0)", True),
        ("MIT OR GPL-2.0 AND LGPL-2.1", True),              # AND binds tighter
        ("GPL-2.0 OR MIT AND LGPL-2.1", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("LicenseRef-Proprietary", False),
        ("(MIT", False),
        ("MIT OR)", False),
        ("MIT OR AND", False),
        ("MIT WITH OR", False),
        ("MIT MIT", False),
        ("MIT AND GNU GPL v3", False),                      # as two classifiers are read
        ("", False),
        (UNKNOWN, False),
    ],
)
def test_permissive_licences(expression, permissive):
    assert is_permissive(expression) is permissive


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License_Expression": "MIT", "License": "GPL"}, "MIT"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        ({"License": "MPL-2.0 AND MIT"}, "MPL-2.0 AND MIT"),
        ({"License": "Copyright (c) 2005\nAll rights reserved", "Classifier": f"{OSI} :: BSD License"}, "BSD-3-Clause"),
        ({"Classifier": [f"{OSI} :: MIT License", f"{OSI} :: Apache Software License"]}, "MIT AND Apache-2.0"),
        ({"Classifier": [f"{OSI} :: MIT License", f"{OSI} :: GNU GPL v3"]}, "MIT AND GNU GPL v3"),
        ({"Classifier": OSI}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_licence_from_metadata(fields, expected):
    assert license_of(metadata(**fields)) == expected


def test_closure_follows_requirements():
    found = closure(["jinja2"])
    assert set(found) == {"jinja2", "markupsafe"}
    assert found["jinja2"].version == distribution("jinja2").version


def test_a_missing_root_is_named():
    with pytest.raises(DataError, match=r"'no-such-distribution'.*not installed\.\n.*`roots`"):
        closure(["jinja2", "no-such-distribution"])


def test_all_roots_are_every_distribution_once_the_importable_one(tmp_path, monkeypatch):
    for number, folder in enumerate(("first", "second"), start=1):
        info = tmp_path / folder / f"jinja2-{number}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Jinja2\nVersion: {number}\n")
    (tmp_path / "second/half-2.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    found = everything()
    assert found["jinja2"].version == "1" and {"numpy", "markupsafe", "pytest"} <= set(found)
    assert not [name for name in found if name.startswith("nvidia-") or name == "triton"]
    monkeypatch.undo()
    monkeypatch.setattr(installed, "everything", lambda: closure(["jinja2"]))       # of all it takes seconds
    assert {file.source for file in installed_files("all", 1)} > {"jinja2", "markupsafe", "python/json"}


def test_a_package_that_does_not_list_its_files_is_passed_over(tmp_path, monkeypatch):
    """As Debian's are: without RECORD."""
    info = tmp_path / "debians-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: debians\nVersion: 1\nRequires-Dist: jinja2\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    first, *others = pieces(embedded(["debians"], "code"), 3, 10**9)
    assert list(first.read()) == [PassedOver("packages", "no list of files (RECORD)", "debians")]
    assert others == pieces(embedded(["jinja2"], "code"), 3, 10**9)


def test_order_depends_on_seed_and_names_only():
    first, again, other = (installed_files(["jinja2"], seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other)
    assert {file.source for file in first} > {"jinja2", "markupsafe", "python/json"}


def embedded(roots: list[str], *domains: str) -> InstalledSource:
    return InstalledSource(kind="installed", roots=roots, megabytes=dict.fromkeys(domains, 1.0))


def test_pieces_cut_the_same_documents_anywhere():
    source = embedded(["jinja2", "tqdm"], "code", "docs")
    whole, small = pieces(source, 3, 10**9), pieces(source, 3, 20_000)
    assert len(whole) == 1 and len(small) > 20 and digest(whole) != digest(small)
    taken = [item for piece in small[:20] for item in piece.read()]
    for item, expected in zip(taken, pickle.loads(pickle.dumps(whole[0])).read(), strict=False):
        assert item == expected
    assert {item.domain for item in taken if isinstance(item, Document)} == {"code", "docs"}


def test_what_is_not_permissively_licensed_is_refused():
    """tqdm is under MPL-2.0 AND MIT."""
    found = [item for piece in pieces(embedded(["tqdm"], "code"), 3, 10**5)
             if any(file.source == "tqdm" for file in piece.files) for item in piece.read()]
    from_tqdm = [item for item in found if isinstance(item, Refusal) and item.where.startswith("tqdm, ")]
    assert len(from_tqdm) > 20 and {(item.domain, item.reason) for item in from_tqdm} == {("code", "license")}
    documents = [item for item in found if isinstance(item, Document)]
    assert documents
    assert all(is_permissive(document.license) and document.source != "tqdm" for document in documents)


def test_headers_of_wheels_are_a_domain_of_their_own():
    (package,) = pieces(embedded(["numpy"], "headers"), 3, 10**9)
    assert all(file.source == "numpy" for file in package.files)
    headers = list(package.read())
    assert all(document.domain == "headers" for document in headers)
    assert any("#define" in document.text and document.path.endswith("ndarraytypes.h") for document in headers)


def test_no_tests_and_nothing_of_this_project():
    for file in installed_files(["numpy"], 1):
        parts = Path(file.path).parts
        assert not {"test", "tests", "data_pipeline", "stages", "__pycache__"} & set(parts[:-1])


def without_docstring_nodes(tree: ast.Module) -> str:
    """Independent of the code under test: the tree with docstrings cut out, printed."""
    for node in ast.walk(tree):
        documentable = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documentable and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


@pytest.mark.parametrize("name", ["typing.py", "asyncio/tasks.py", "argparse.py", "enum.py", "heapq.py"])
def test_code_without_docstrings_is_the_same_program(name):
    text = (STANDARD_LIBRARY / name).read_text()
    stripped = without_docstrings(text, ast.parse(text))
    assert ast.dump(ast.parse(stripped)) == without_docstring_nodes(ast.parse(text))
    assert len(stripped) < len(text)


def test_docstrings_on_shared_lines_stay():
    text = 'def f(): "one line"\ndef g():\n    "doc"; return 1\nclass C:\n    """only"""\n'
    stripped = without_docstrings(text, ast.parse(text))
    assert stripped == 'def f(): "one line"\ndef g():\n    "doc"; return 1\nclass C:\n    pass\n'


def test_pages_hold_every_docstring_once():
    text = (STANDARD_LIBRARY / "argparse.py").read_text()
    tree = ast.parse(text)
    pages = list(docstring_pages(tree, "argparse", signatures=True))
    everything = "\n".join(page for _, page in pages)
    documented = [
        node for parent in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in [parent, *(child for child in parent.body if isinstance(child, ast.FunctionDef))]
        if ast.get_docstring(node)
    ]
    for docstring in {ast.get_docstring(node) for node in documented}:
        assert everything.count(docstring) >= 1
    assert len(pages) > 1 and len({name for name, _ in pages}) == len(pages)
    assert "class HelpFormatter(object)" in everything or "class HelpFormatter" in everything
    assert "def " not in pages[0][1].split("\n\n")[1]


def test_broken_python_is_no_document():
    assert parse("print 'python 2'") is None
    assert parse("x = '\0'") is None


def source_file(path: Path, kind: str = "python", source: str = "somewhere") -> SourceFile:
    return SourceFile(source, path.name, "MIT", kind, path, 0)


def test_files_that_cannot_be_read_give_a_reason(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "cookie.py").write_bytes(b"# coding: no-such-codec\n")
    (tmp_path / "rot13.py").write_bytes(b"# coding: rot13\n")         # a codec, and of no text
    (tmp_path / "old.py").write_text("print 'python 2'\n")
    assert read_documents(source_file(tmp_path / "absent.py"), ALL) == "unreadable"
    assert read_documents(source_file(tmp_path), ALL) == "unreadable"                   # a directory
    assert read_documents(source_file(tmp_path / "latin.py"), ALL) == "unreadable"
    assert read_documents(source_file(tmp_path / "cookie.py"), ALL) == "unreadable"
    assert read_documents(source_file(tmp_path / "rot13.py"), ALL) == "unreadable"
    assert read_documents(source_file(tmp_path / "old.py"), ALL) == "syntax"


def test_a_file_in_its_own_encoding(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\r\nx = '\xe9'\r\n")
    (document,) = read_documents(source_file(tmp_path / "latin.py"), ALL)
    assert document.text == "# -*- coding: latin-1 -*-\nx = 'é'\n"


def test_domains_of_a_file(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('"""About."""\n\ndef f(x: int) -> str:\n    """Do it."""\n    return str(x)\n')
    found = {document.domain: document.text for document in read_documents(source_file(file), ALL)}
    assert found == {"code": "\ndef f(x: int) -> str:\n    return str(x)\n", "docs": "module\n\nAbout.\n\nf\n\nDo it."}
    found = {d.domain: d.text for d in read_documents(source_file(file, source="python/module"), ALL)}
    assert found["reference"] == "module\n\nAbout.\n\nf(x: int) -> str\n\nDo it."
    assert [d.domain for d in read_documents(source_file(file), frozenset({"docs"}))] == ["docs"]
    assert read_documents(source_file(file), frozenset({"reference"})) == []


def test_the_language_reference_is_read():
    path = STANDARD_LIBRARY / "pydoc_data" / "topics.py"
    documents = read_documents(source_file(path, kind="topics", source="python/pydoc_data"), ALL)
    assert len(documents) > 50 and all(document.domain == "reference" for document in documents)
    assert any(document.path.endswith("#while") and '"while" statement' in document.text for document in documents)
