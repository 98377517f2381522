"""The profile `web` as a user runs it first, its data stages on a tiny data set of a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.profile import resolve
from tests.data_pipeline.annotate_corpus import STDLIB
from tests.data_pipeline.sources import hub_server
from tests.data_pipeline.sources.test_sources_hub_server import parquet

ROOT = Path(__file__).resolve().parents[2]
# What a billion tokens and a GPU's machine need, and 200 pages do not.
TINY = {
    "annotate.shard_megabytes": 1, "annotate.held_out.fraction": 0.1, "tokenizer.vocab_size": 1024,
    "tokenize.validation_kilobytes_per_domain": 20, "tokenize.repeats": 50, "pretrain.tokens": 65_536,
    "runtime.workers": 1,
}
README = "---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/10BT/*\n---\n"


def pages() -> list[str]:
    """Parts of Python's reference, a paragraph each."""
    topics = (STDLIB / "pydoc_data" / "topics.py").read_text().replace("\\n'\n", "\n").replace("            '", "")
    return [" ".join(topics[start : start + 2500].split()) + "." for start in range(0, 500_000, 2500)]


@pytest.mark.slow
def test_the_data_stages_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(resolve("web"))
    source, = YAML(typ="safe").load(tmp_path / "params.yaml")["annotate"]["sources"]
    monkeypatch.setattr(hub_server, "COMMIT", source["revision"])
    texts, name = pages(), source["dataset"]
    with hub_server.hub() as server:
        server.files = {f"{name}/README.md": README.encode(), f"{name}/data/other.parquet": parquet(text=["not asked"])}
        for number in range(2):
            half = texts[number::2]
            server.files[f"{name}/sample/10BT/{number:03d}_00000.parquet"] = parquet(
                text=half, id=[f"<urn:uuid:{at}>" for at in range(len(half))], score=[3.5] * len(half))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": server.address,
                       "HF_HOME": str(tmp_path / "hf"), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        for variable in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            environment.pop(variable, None)
        for stage in ("sources", "annotate", "curate", "tokenizer", "tokenize", "items"):
            command = [sys.executable, "-m", f"stages.{stage}", "--settings", "in TINY"]
            command += [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
            command += ["--out", "out"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stderr
    annotated = json.loads(Path("out/data/annotated/manifest.json").read_text())
    assert annotated["domains"] == {"web": len(texts)} and annotated["refusals"] == {}
    assert all(f"/resolve/{source['revision']}/" in request for request in server.requests if "parquet" in request)
    files = json.loads(Path("out/data/tokens/tokens.json").read_text())["files"]
    assert all(files[f"train/web-{label}"]["tokens"] for label in ("high", "medium-high", "medium"))
    assert files["validation/web"]["documents"] > 5
