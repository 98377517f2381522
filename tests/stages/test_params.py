"""params.yaml: what is accepted, and what a mistake reads like."""

from pathlib import Path

import pytest

from stages.frame.params import ParamsError, load_params

ROOT = Path(__file__).resolve().parents[2]


def refused(text: str, tmp_path: Path) -> list[str]:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError) as error:
        load_params(path)
    return str(error.value).splitlines()


def edited(old: str, new: str) -> str:
    text = (ROOT / "params.yaml").read_text()
    assert old in text
    return text.replace(old, new, 1)


def test_repository_file_is_valid_and_its_models_match_in_size():
    from model.costs import parameters

    params = load_params(ROOT / "params.yaml")
    hybrid, transformer = (parameters(params.model_of(name)) for name in ("hybrid-bf16", "transformer-bf16"))
    assert abs(hybrid / transformer - 1) < 0.02


@pytest.mark.parametrize(("old", "new", "place"), [
    ("  learning_rate", "  learning_rat", "pretrain"), ("precision", "precison", "variants.hybrid-fp8"),
])
def test_unknown_key_suggests_the_nearest(old, new, place, tmp_path):
    lines = refused(edited(f"{old}: ", f"{new}: "), tmp_path)
    assert any(f"unknown key `{place}.{new.strip()}`" in line for line in lines)
    assert f"Did you mean `{old.strip()}`?" in lines


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("decay_style: cosine", "decay_style: minus_sqrt", "without decay_fraction"),
        ("decay_fraction: null", "decay_fraction: 0.2", "decay_fraction (0.2) with decay_style cosine"),
        ("  min_learning_rate: 3.0e-5", "  min_learning_rate: 3.0e-2", "min_learning_rate (0.03) must not exceed"),
        ("bf16_layers_at_start: 4", "bf16_layers_at_start: 15",
         "variants.hybrid-fp8: pretrain.bf16_layers_at_start (15) and _at_end (4) leave none of its 19 layers"),
        ("precision: fp8, seed: 1", "precision: fp8, seed: 1, fp8_recipe: delayed",
         "variants.hybrid-fp8.fp8_recipe"),
        ("precision: bf16, seed: 1", "precision: bf16, seed: 1, fp8_recipe: unscaled",
         "fp8_recipe unscaled with precision bf16"),
        ("  global_batch_size: 8            # sequences a step", "  global_batch_size: 12",
         "global_batch_size (12) must be a multiple of micro_batch_size (8)"),
        ("megabytes: {code: 7, docs: 6", "megabytes: {code: 7, docs: 0", "megabytes.docs"),
        ("  transformer-bf16: {", "  compressed: {", "variants.compressed: the stage compress writes a model"),
        ("  transformer-bf16: {", "  ../mine: {", "variants.../mine.[key]"),
        ("variants:\n", "variants:\n  again: {architecture: hybrid, precision: bf16, seed: 1}\n",
         "variants.again and variants.hybrid-bf16 are one and the same training"),
        ("variants:\n", "variants:\n  again: {architecture: hybrid, precision: fp8, seed: 1, fp8_recipe: current}\n",
         "variants.again and variants.hybrid-fp8 are one and the same training"),
        ("fp8_recipe: current ", "fp8_recipe: unscaled ",
         "variants.hybrid-fp8 and variants.hybrid-fp8-unscaled are one and the same training"),
        ("  transformer:  ", "  baseline:  ", "`model` has no transformer, which the stage benchmark times"),
        ("num_query_groups: 2", "num_query_groups: 3", "must be a multiple of"),
        ("pattern: M-M", "pattern: Mx-M", "model.hybrid.pattern"),
        ("until: 1.0", "until: 0.99", "the last at 1.0"),
        ("{until: 0.6, weights: {code: 0.45", "{until: 0.6, weights: {code: .nan", "tokenize.phases.0.weights.code"),
        ("docs: {set: prose", "docs: {thresholds: {words: [.nan, null]}, set: prose", "thresholds.words.0"),
        ("docs: {set: prose", "docs: {thresholds: {words: [500, 50]}, set: prose",
         "thresholds.words: 500 to 50 is no range"),
        ("parent: hybrid-fp8", "parent: hybrid-fp9", "compress.parent is 'hybrid-fp9'"),
        ("hybrid-bf16: {architecture: hybrid", "hybrid-bf16: {architecture: hybird", "hybird"),
        ("vocab_size: 4096", "vocab_size: 4095", "multiple of 16"),
        ("  learning_rate: ", "  learning_rate: true  # ", "`pretrain.learning_rate`: a truth value (true)"),
        ("variants:\n", "variants:\n  another: {architecture: hybrid, precision: bf16, seed: 2001-99-99}\n",
         "not valid YAML: month"),
        ("    docs: {set: prose", "    dosc: {set: prose", "curate.rules has no entry for docs,"),
        ("runtime:\n", "runtime:\n  launcher: {processes_per_node: 8}\n", "kind `here` is one process, not 1 x 8"),
        ("runtime:\n", "runtime:\n  launcher: {kind: slurm, nodes: 2, rendezvous: 'a:1'}\n",
         "rendezvous (a:1) is for torchrun of several nodes, not for kind `slurm` of 2"),
        ("runtime:\n", "runtime:\n  parallel: {sequence: true}\n",
         "sequence is split over the tensor-parallel processes, and tensor is 1"),
        ("share: 0.3, domains: [docs]", "share: 0.3, domains: [dosc]", "curate.language.domains names dosc,"),
        ("bytes: 200, domains: [docs]", "bytes: 200, domains: [dosc]", "annotate.substring.domains names dosc,"),
    ],
)
def test_impossible_value_names_its_field(old, new, expected, tmp_path):
    lines = refused(edited(old, new), tmp_path)
    assert expected in lines[0]
    assert len(lines) == 2


def test_warmup_and_decay_fit_into_the_run(tmp_path):
    text = edited("decay_style: cosine", "decay_style: minus_sqrt")
    text = text.replace("decay_fraction: null", "decay_fraction: 0.2")
    (tmp_path / "wsd.yaml").write_text(text)
    assert load_params(tmp_path / "wsd.yaml").pretrain.decay_fraction == 0.2
    lines = refused(text.replace("warmup_fraction: 0.05", "warmup_fraction: 0.95"), tmp_path)
    assert "warmup_fraction + decay_fraction must not exceed 1" in lines[0] and len(lines) == 2


def test_a_variant_may_have_an_fp8_recipe_of_its_own(tmp_path):
    arm = "another-unscaled: {architecture: hybrid, precision: fp8, seed: 4, fp8_recipe: unscaled}"
    (tmp_path / "params.yaml").write_text(edited("variants:\n", f"variants:\n  {arm}\n"))
    params = load_params(tmp_path / "params.yaml")
    assert params.recipe_of("hybrid-fp8") == params.pretrain and params.pretrain.fp8_recipe == "current"
    assert params.recipe_of("hybrid-fp8-unscaled") == params.pretrain.model_copy(update={"fp8_recipe": "unscaled"})


@pytest.mark.parametrize("text", ["profile: [", "just text", ""])
def test_not_a_mapping(text, tmp_path):
    assert len(refused(text, tmp_path)) == 2


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"profile: caf\xe9\n")
    for path in (tmp_path / "latin.yaml", tmp_path):
        with pytest.raises(ParamsError, match=rf"^{path}: cannot be read \(.+\)\.\n.+$"):
            load_params(path)


def test_missing_file(tmp_path):
    with pytest.raises(ParamsError, match="not found"):
        load_params(tmp_path / "params.yaml")


def test_override_and_its_errors():
    assert load_params(ROOT / "params.yaml", ("pretrain.learning_rate=1e-3",)).pretrain.learning_rate == 1e-3
    with pytest.raises(ParamsError, match="KEY=VALUE"):
        load_params(ROOT / "params.yaml", ("pretrain.learning_rate",))
    with pytest.raises(ParamsError, match="not a section"):
        load_params(ROOT / "params.yaml", ("seed.x=1",))


def test_what_is_wrong_between_sections_is_said_without_their_content():
    with pytest.raises(ParamsError) as error:
        load_params(ROOT / "params.yaml", ("compress.parent=nosuch",))
    assert str(error.value) == ("--set compress.parent=nosuch: compress.parent is 'nosuch', which `variants` does not "
                                "define.\nCorrect the value.")


def test_what_is_wrong_in_the_file_is_not_an_overrides(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(edited("fp8_recipe: current ", "fp8_recipe: unscaled "))
    with pytest.raises(ParamsError, match=rf"^{file}: variants.hybrid-fp8 and "):
        load_params(file, ("pretrain.tokens=8192",))


def test_an_override_reaches_a_field_of_a_list():
    params = load_params(ROOT / "params.yaml", ("annotate.sources.0.roots=[numpy]", "tokenize.phases.3.until=1.0"))
    assert params.annotate.sources[0].roots == ["numpy"] and len(params.tokenize.phases) == 4


@pytest.mark.parametrize(("assignment", "expected"), [
    ("annotate.sources.1.domain=web", "`1` is a value"), ("annotate.sources.x.domain=web", "`x` is a value"),
    ("annotate.sources.0=web", "as a whole"), ("annotate.sources=[1,", "not valid YAML"),
    ("seed=-1", "`seed`"), (f"seed={10**23}", "`seed`"), ("variants.hybrid-fp8.seed=-1", "`variants.hybrid-fp8.seed`"),
    ("pretrain.adam_betas=[0.9,1]", r"`pretrain\.adam_betas\.1`"),
    ("benchmark.contexts=[256, 64, 256]", r"`benchmark\.contexts`: 256 stands in it twice"),
    ("models=[compressed, compressed]", "twice"), ("evaluate.context_multiples=[1, 1]", "twice"),
    ("evaluate.context_multiples=[0]", r"`evaluate\.context_multiples\.0`"),
    ("annotate.x=!!python/object/apply:os.mkdir [sprung]", "not valid YAML"),
    *((f"annotate.sources=[{{kind: files, paths: [x], domain: '{domain}'}}]", "`annotate.sources.0.files.domain`")
      for domain in ('"><script>', "../../esc", "web; x", "")),
    ("annotate.shard_megabytes=.inf", r"`annotate\.shard_megabytes`"),
    *((f"model.hybrid.init_method_std={value}", r"`model\.hybrid\.init_method_std`") for value in ("0", "-1", ".inf")),
    ("annotate.mask=[all]", r"^--set annotate\.mask: `annotate\.mask\.0`"),
    ("annotate.held_out={fraction: 2, unit: source}", r"^--set annotate\.held_out: `annotate\.held_out\.fraction`"),
    ("pretrain.fp8_recipe=unscaled", "^--set pretrain.fp8_recipe=unscaled: variants.hybrid-fp8 and .* are one"),
    ("pretrain.min_learning_rate=1", "^--set pretrain.min_learning_rate=1: `pretrain`: .* must not exceed"),
])
def test_a_wrong_override_is_named_and_not_the_file(assignment, expected):
    with pytest.raises(ParamsError, match=expected) as error:
        load_params(ROOT / "params.yaml", ("pretrain.tokens=8192", assignment, "benchmark.repeats=3"))
    assert "params.yaml" not in str(error.value) and str(error.value).count("\n") <= 1
