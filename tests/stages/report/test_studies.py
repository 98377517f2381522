"""A study's record as it is written and read, and every way in which it cannot be used."""

import json

import pytest
from pydantic import ValidationError

from stages.report.records import RecordError, load_studies, read_study
from stages.report.study_schema import Study

CONTENT = {
    "study": "position", "command": "python -m benchmarks.position", "machine": "2 cores",
    "date": "2026-11-29", "commit": "d6c7349", "versions": {"torch": "2.13.0"}, "note": "",
    "measurements": [
        {"name": "hybrid", "values": [0.9, 0.8, 0.85], "unit": "accuracy", "better": "higher", "chance": 0.1},
        {"name": "transformer", "values": [0.7, 0.6, 0.75], "unit": "accuracy", "better": "higher", "chance": 0.1},
    ],
    "comparisons": [
        {"claim": "position", "candidate": "hybrid", "reference": "transformer", "question": "better"},
    ],
}


def test_what_is_saved_is_read(tmp_path):
    study = Study.model_validate(CONTENT)
    assert read_study(study.save(tmp_path)) == study
    assert load_studies(tmp_path) == {"position": study}
    assert load_studies(tmp_path / "none") == {}
    assert study.asked("position") == study.comparisons and not study.asked("recall")


@pytest.mark.parametrize(("change", "message"), [
    ({"date": None}, "`date`"),
    ({"date": "yesterday"}, "`date`"),
    ({"version": 0}, r"`version` \(Input should be 1\); of another version"),
    ({"measurements": []}, "`measurements`"),
    ({"measurements": CONTENT["measurements"][:1]}, r"comparisons name \['transformer'\]"),
    ({"machine": ""}, "`machine`"),
    ({"versions": {}}, "`versions`"),
    ({"study": "../position"}, "`study`"),
    ({"study": "other"}, "this study decides no claim"),
    ({"study": "other", "comparisons": []}, "holds the study `other`"),
    ({"verdict": "holds"}, "`verdict` is unknown"),
    ({"date": ...}, r"position\.json: `date` is missing; of another version\.\nMake it again"),
    ("", "empty"), ("{", "not valid JSON"), ("{}", "`study` is missing"),
])
def test_a_record_that_cannot_be_used_is_two_lines(tmp_path, change, message):
    path = tmp_path / "position.json"
    path.write_text(change if isinstance(change, str) else json.dumps({
        key: value for key, value in (CONTENT | change).items() if value is not ...}))
    with pytest.raises(RecordError, match=message) as caught:
        read_study(path)
    assert len(str(caught.value).splitlines()) == 2
    assert isinstance(load_studies(tmp_path)["position"], RecordError)


def compared(a=(), b=(), c=(), **comparison):
    """A study that compares a with b; c is for a control. Measurements are alike but for what is given."""
    measured = [{"name": name, "values": [1.0, 2.0], "unit": "points", "better": "higher"} | dict(change)
                for name, change in (("a", a), ("b", b), ("c", c))]
    asked = {"claim": "position", "candidate": "a", "reference": "b", "question": "better"} | comparison
    return Study.model_validate(CONTENT | {"measurements": measured, "comparisons": [asked]})


def test_comparisons_that_mean_nothing_are_refused():
    one, three, null, equal = {"values": [1.0]}, {"values": [1.0] * 3}, {"values": [0.0, 1.0]}, {
        "question": "equal", "margin": 1.0, "control": "c"}
    assert compared(one, paired=False) and compared(one, reference=3.0) and compared(null) and compared(c=one, **equal)
    for wrong, message in (
        ({"a": one}, "differ in their number"),
        ({"b": one}, "differ in their number"),
        ({"c": three} | equal, "differ in their number"),
        ({"a": {"better": None}, "b": {"better": None}}, "or have none"),
        ({"a": {"better": "lower"}}, "differ in unit or direction"),
        ({"b": {"unit": "nats"}}, "differ in unit or direction"),
        ({"c": {"unit": "nats"}} | equal, "differ in unit or direction"),
        ({"c": {"name": "b"}}, "two measurements have one name"),
        ({"c": {"name": ""}}, "at least 1 character"),
        ({"c": {"values": []}}, "at least 1 item"),
        ({"c": {"items": 0}}, "greater than or equal to 1"),
        ({"c": {"chance": float("nan")}}, "finite"),
        ({"a": null, "relative": True}, "above 0"),
        ({"b": null, "relative": True}, "above 0"),
        ({"relative": True, "paired": False, "reference": 0.0}, "above 0"),
        ({"reference": float("inf")}, "finite"),
        ({"question": "equal"}, "needs a margin"),
        ({"question": "not worse"}, "needs a margin"),
        ({"question": "equal", "margin": -0.1}, "greater than or equal to 0"),
        ({"question": "equal", "margin": float("inf")}, "finite"),
        ({"control": "a"}, "takes no control"),
        ({"claim": "hybrid_loss"}, "this study decides no claim"),
        ({"a": {"values": [float("nan"), 1.0]}}, "finite"),
    ):
        with pytest.raises(ValidationError, match=message):
            compared(**wrong)
