"""A study's record as it is written and read, and every way in which it cannot be used."""

import json

import pytest
from pydantic import ValidationError

from stages.report.records import RecordError, load_studies, read_study
from stages.report.study_schema import Comparison, Measurement, Study

CONTENT = {
    "version": 1, "study": "position", "command": "python -m benchmarks.position", "machine": "2 cores",
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


@pytest.mark.parametrize(("change", "message"), [
    ({"date": None}, "`date`"),
    ({"date": "yesterday"}, "`date`"),
    ({"version": 0}, r"`version` \(Input should be 1\); of another version"),
    ({"measurements": []}, "`measurements`"),
    ({"measurements": CONTENT["measurements"][:1]}, r"comparisons name \['transformer'\]"),
    ({"machine": ""}, "`machine`"),
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


def compared(candidate=(1.0, 2.0), reference=(1.0, 2.0), better="higher", fixed="b", **comparison):
    def measured(name, values):
        return Measurement(name=name, values=list(values), unit="points", better=better)

    asked = {"claim": "position", "candidate": "a", "reference": fixed, "question": "better"} | comparison
    return Study.model_validate(CONTENT | {"measurements": [measured("a", candidate), measured("b", reference)],
                                           "comparisons": [Comparison.model_validate(asked)]})


def test_comparisons_that_mean_nothing_are_refused():
    assert compared((1.0,), paired=False)
    for wrong, message in (
        (lambda: compared((1.0,)), "differ in their number"),
        (lambda: compared(better=None), "or have none"),
        (lambda: compared((0.0, 1.0), relative=True), "above 0"),
        (lambda: compared(relative=True, paired=False, fixed=0.0), "above 0"),
        (lambda: compared(question="equal"), "needs a margin"),
        (lambda: compared(control="a"), "takes no control"),
        (lambda: compared(claim="hybrid_loss"), "this study decides no claim"),
        (lambda: compared((float("nan"), 1.0)), "finite"),
    ):
        with pytest.raises(ValidationError, match=message):
            wrong()
