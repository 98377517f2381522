import pickle
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipeline.config import DataError
from data_pipeline.curated import OVERSUPPLY, DomainSurvey, batches, manifest, sample, shards, survey, with_ids
from tests.data_pipeline.small_corpus import write_shards


def documents(count: int = 400, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    texts = [f"{number} " + "é" * draw.randint(0, 300) for number in range(count)]
    return [{"id": xxhash.xxh3_128_hexdigest(text.encode()), "text": text, "domain": draw.choice(["code", "docs"])}
            for text in texts]


def size(text: str) -> int:
    return len(text.encode())


def test_sample_does_not_depend_on_the_number_of_shards_and_fills_its_room(tmp_path):
    rows = documents()
    results = [sample(write_shards(tmp_path / str(count), rows, count), 20_000, 3).to_pylist() for count in (1, 2, 7)]
    assert results[0] == results[1] == results[2]
    for domain in ("code", "docs"):
        chosen = [row for row in results[0] if row["domain"] == domain]
        assert 19_000 < sum(size(row["text"]) for row in chosen) <= 20_000
    positions = [rows.index(row) for row in results[0]]
    assert positions == sorted(positions)
    assert results[0] != sample(shards_of(tmp_path / "1"), 20_000, 4).to_pylist()


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.parquet"))


def test_every_document_is_as_likely(tmp_path):
    files, hits = write_shards(tmp_path / "one", documents(), 3), dict.fromkeys((row["id"] for row in documents()), 0)
    for seed in range(40):
        for row in sample(files, 12_000, seed).to_pylist():
            hits[row["id"]] += 1
    first, second = list(hits.values())[:200], list(hits.values())[200:]
    assert sum(first) == pytest.approx(sum(second), rel=0.1)


def test_a_large_sample_is_everything(tmp_path):
    rows = documents()
    assert sample(write_shards(tmp_path / "one", rows, 3), 1e9, 0).to_pylist() == rows


def test_the_survey_counts_everything_and_keeps_little():
    domain = DomainSurvey(room=1000)
    lots = random.Random(1).sample(range(100_000), 20_000)
    for lot in lots:
        domain.add(lot, 10, f"{lot:06d}")
        assert len(domain._kept) <= 2 * OVERSUPPLY * 100 + 1
    assert domain.bytes == 200_000
    assert domain.choose(1000) == [f"{lot:06d}" for lot in sorted(lots)[:100]]
    assert domain.choose(50) == domain.choose(1000)[:5]


def test_documents_that_do_not_fit_are_passed_over_but_one_is_always_chosen():
    domain = DomainSurvey(room=200)
    for lot, length in enumerate((52, 503, 62, 150, 72)):
        domain.add(lot, length, str(length))
    assert domain.choose(200) == ["52", "62", "72"]
    assert domain.choose(10) == ["52"]


def test_survey_lists_domains_by_size(tmp_path):
    rows = [row | {"domain": row["domain"].replace("docs", "articles")} for row in documents()]
    found = survey(write_shards(tmp_path / "one", rows, 2), 100, 0)
    totals = {domain: sum(size(row["text"]) for row in rows if row["domain"] == domain)
              for domain in ("articles", "code")}
    assert [(domain, one.bytes) for domain, one in found.items()] == sorted(totals.items(), key=lambda item: item[1])
    assert list(with_ids([], ["a"])) == []


def test_damage_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train: no part-\*\.parquet.*\nRun the `curate`"):
        shards(tmp_path, "train")
    for content, wrong in (("{", "JSONDecodeError"), ("[]", "TypeError"), ('{"heldout": {}}', r"KeyError\('corpus")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=rf"manifest.json: no manifest .*{wrong}.*\nRun the `curate`"):
            manifest(tmp_path, "heldout", "corpus_digest")
    file = write_shards(tmp_path / "one", documents(50), 1)[0]
    with pytest.raises(DataError, match=r"part-00000.parquet: columns \['label'\] are missing"):
        list(batches(file, ("text", "label")))
    whole = file.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[:200] + bytes(200) + whole[400:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"part-00000.parquet: cannot be read.*\nRun the `curate`"):
            list(batches(file, ("id", "text")))
    pq.write_table(pa.table({"text": ["a", None]}), file)
    with pytest.raises(DataError, match=r"part-00000.parquet: columns \['text'\] have empty rows"):
        list(batches(file, ("text",)))
    assert pickle.loads(pickle.dumps(DataError("a\nb"))).args == ("a\nb",)


def test_no_documents_at_all_are_two_lines(tmp_path):
    """As the held-out shards are where annotate.held_out.fraction is 0."""
    files = write_shards(tmp_path / "heldout", documents(1), 1)
    pq.write_table(pq.read_table(files[0]).slice(0, 0), files[0])
    with pytest.raises(DataError, match=r"heldout: no documents\.\nRaise annotate\.held_out\.fraction"):
        sample(files, 1000, 1)
