"""Settings are strict: a typo, a wrong type or a contradiction is one message that says what to write instead."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from tiger_ray.errors import SettingsError
from tiger_ray.settings.base import Section
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.loading import load_settings, setting_names
from tiger_ray.settings.settings import Settings

REPO = Path(__file__).parents[2]
NAMES_FILE = Path(__file__).with_name("setting_names.txt")
REQUIRED = "storage: {root: /r}\ncatalog: {uri: /c}\nevents: {uri: /e}\n"


@pytest.fixture
def night(tmp_path):
    """Settings from the required ones, more YAML, and the command line."""

    def load(yaml: str = "", *words: str, required: str = REQUIRED) -> Settings:
        file = tmp_path / "night.yaml"
        file.write_text(required + yaml)
        return load_settings(["--config", str(file), "--date", "2026-11-23", *words])

    return load


def test_the_command_line_wins_over_yaml_and_leaves_the_rest_of_a_section_alone(night):
    settings = night("model: {num_layers: 2, d_model: 96}\n", "--model.num_layers", "6")
    assert (settings.model.num_layers, settings.model.d_model) == (6, 96)
    assert settings.date == "2026-11-23"


def test_a_later_file_wins_key_by_key(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(REQUIRED + "date: 2026-11-23\nmodel: {num_layers: 2, d_model: 96}\n")
    second.write_text("model: {num_layers: 3}\n")
    settings = load_settings([f"--config={first}", "--config", str(second)])
    assert (settings.model.num_layers, settings.model.d_model) == (3, 96)
    assert settings.date == "2026-11-23"  # though YAML reads it as a day


def test_lists_and_switches_are_written_plainly_on_the_command_line(night):
    settings = night("", "--evaluation.ks", "5,20", "--storage.replace", "true", "--evaluation.max_users=7")
    assert settings.evaluation.ks == (5, 20)
    assert settings.storage.replace is True
    assert settings.evaluation.max_users == 7


def test_an_unknown_key_in_yaml_names_file_key_and_nearest_key(night):
    with pytest.raises(
        SettingsError,
        match=r"night\.yaml.*\n.*unknown setting model\.num_layer; did you mean model\.num_layers\?",
    ):
        night("model: {num_layer: 2}\n")


def test_an_unknown_section_in_yaml_is_refused(night):
    with pytest.raises(SettingsError, match="unknown setting modle"):
        night("modle: {num_layers: 2}\n")


@pytest.mark.parametrize(
    "words", [("--trainning.num_steps", "3"), ("--trainning.num_steps=3",)], ids=["two words", "one word"]
)
def test_an_unknown_key_on_the_command_line_names_the_nearest_key(night, words):
    with pytest.raises(
        SettingsError,
        match=r"unknown setting --trainning\.num_steps; did you mean training\.num_steps\?",
    ):
        night("", *words)


def test_a_key_like_no_other_points_to_help(night):
    with pytest.raises(
        SettingsError, match=r"unknown setting --zzzzzzzzzzzz; tiger-ray run --help lists them all"
    ):
        night("", "--zzzzzzzzzzzz", "3")


@pytest.mark.parametrize(
    ("yaml", "words", "message"),
    [
        ("model: {num_layers: many}\n", (), r"model\.num_layers: .*integer.*\(got 'many'\)"),
        ("", ("--model.num_layers", "many"), r"model\.num_layers: .*integer.*\(got 'many'\)"),
        ("model: {num_layers: 0}\n", (), r"model\.num_layers: .*greater than or equal to 1 \(got 0\)"),
        (
            "quantizer: {kind: pq}\n",
            (),
            r"quantizer\.kind: .*'rqvae', 'residual_kmeans'.* or 'flat' \(got 'pq'\)",
        ),
        ("evaluation: {max_drop: 20}\n", (), r"evaluation\.max_drop: .*less than or equal to 1 \(got 20\)"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(night, yaml, words, message):
    with pytest.raises(SettingsError, match=message):
        night(yaml, *words)


def test_a_missing_required_setting_says_both_ways_to_set_it(night):
    with pytest.raises(
        SettingsError, match=r"catalog\.uri is required: set it in the YAML file or with --catalog\.uri"
    ):
        night(required="storage: {root: /r}\nevents: {uri: /e}\n")


def test_all_problems_are_reported_at_once(night):
    with pytest.raises(SettingsError) as caught:
        night("model: {num_layer: 2, d_model: 0}\n", "--training.num_steps", "x")
    for name in ("model.num_layer;", "model.d_model:", "training.num_steps:"):
        assert f"  {name}" in str(caught.value) or f"unknown setting {name}" in str(caught.value)


def test_a_date_that_is_no_day_is_refused(night):
    with pytest.raises(SettingsError, match=r"date must be a day like 2026-11-23, not '2026-02-30'"):
        night("", "--date", "2026-02-30")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "recommendations: {top_k: 50}\n",
            r"beam_width is 20, but 50 items .* raise decoding\.beam_width",
        ),
        ("embeddings: {encoder: catalog}\n", r"catalog\.vector must name the vector column"),
        (
            "training: {global_batch_size: 3, num_workers: 4}\n",
            r"global_batch_size is 3 and training\.num_workers is 4: some workers would have no example; raise",
        ),
        (
            "training: {patience: 3, holdout: none}\n",
            r"patience waits for a better NDCG@10, which needs training\.validation_users above 0 and training\.hol",
        ),
        ("training: {patience: 3, validation_users: 0}\n", r"training\.validation_users above 0"),
        (
            "evaluation: {exclude_history: true, max_history: 20}\n",
            r"evaluation\.exclude_history masks whole histories, .* Leave evaluation\.max_history empty",
        ),
        (
            "events: {uri: /e, event_type: kind}\n",
            r"events\.event_type and events\.event_types must be given together",
        ),
        (
            "events: {uri: /e, ties: column}\n",
            r"events\.ties is 'column', so events\.tie must name the column",
        ),
        (
            "events: {uri: /e, tie: place}\n",
            r"events\.tie names the column 'place', but events\.ties is 'hash' .* set events\.ties to 'column'",
        ),
        (
            "events: {uri: /e, ties: column, tie: timestamp}\n",
            r"events\.tie is the column of events\.timestamp, 'timestamp', which cannot tell equal timestamps",
        ),
        (
            "sequences: {test_from: 2014-04-01}\n",
            r"sequences\.validation_from and sequences\.test_from must be given together",
        ),
        (
            "sequences: {validation_from: 2014-04-01, test_from: 2014-04-01T00:00:00Z}\n",
            r"validation_from 2014-04-01 00:00:00\+00:00 must be before sequences\.test_from 2014-04-01 00:00:00",
        ),
        (
            "training: {holdout: time}\n",
            r"training\.holdout is 'time', so sequences\.validation_from and sequences\.test_from must say where",
        ),
        (
            "events: {uri: /e, timestamp_unit: position}\n"
            "sequences: {validation_from: 2014-03-01, test_from: 2014-04-01}\n",
            r"are times, but events\.timestamp_unit is 'position', .* holds no times\. Name a column with times",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_remedy(night, yaml, message):
    required = REQUIRED if "events:" not in yaml else "storage: {root: /r}\ncatalog: {uri: /c}\n"
    with pytest.raises(SettingsError, match=message):
        night(yaml, required=required)


@pytest.mark.parametrize(
    "written", ["2014-03-01", "2014-03-01T00:00:00", "2014-03-01T00:00:00Z", "2014-03-01T01:30:00+01:30"]
)
def test_a_moment_is_the_same_however_it_is_written(night, written):
    day = datetime(2014, 3, 1, tzinfo=UTC)
    by_file = night(f"sequences: {{validation_from: {written}, test_from: 2014-04-01}}\n")
    by_words = night("", "--sequences.validation_from", written, "--sequences.test_from", "2014-04-01")
    assert by_file.sequences.validation_from == by_words.sequences.validation_from == day
    assert by_file.sequences.fingerprint() == by_words.sequences.fingerprint()
    assert by_file.sequences.fingerprint()["validation_from"] == "2014-03-01T00:00:00Z"
    assert Settings(**by_file.resolved()) == by_file


@pytest.mark.parametrize("written", ["1393632000", "20140301", "March 2014", "2014-02-30"])
def test_a_moment_that_is_neither_a_day_nor_a_time_is_refused(night, written):
    message = r"validation_from: (must be a day or a time like 2014-01-01 or|day is out of range)"
    with pytest.raises(SettingsError, match=message):
        night("sequences: {test_from: 2014-04-01}\n", "--sequences.validation_from", written)
    with pytest.raises(SettingsError, match=rf"{message}|night\.yaml is not YAML: day is out of range"):
        night(f"sequences: {{validation_from: {written}, test_from: 2014-04-01}}\n")


def test_settings_cannot_be_changed_afterwards(night):
    settings = night()
    with pytest.raises(ValidationError, match="frozen"):
        settings.model.num_layers = 3
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 3


def test_environment_variables_fill_yaml_values_and_nothing_else(night, monkeypatch):
    monkeypatch.setenv("TIGER_TEST_FOLDER", "/from/env")
    monkeypatch.setenv("SEED", "99")
    monkeypatch.setenv("MODEL__NUM_LAYERS", "99")
    settings = night(
        required="storage: {root: '${TIGER_TEST_FOLDER}/root'}\ncatalog: {uri: /c}\nevents: {uri: /e}\n"
    )
    assert settings.storage.root == "/from/env/root"
    assert (settings.seed, settings.model.num_layers) == (0, 4)


def test_an_environment_variable_that_is_not_set_is_named(night, monkeypatch):
    monkeypatch.delenv("TIGER_TEST_FOLDER", raising=False)
    with pytest.raises(SettingsError, match=r"night\.yaml uses \$\{TIGER_TEST_FOLDER\}.*not set"):
        night("seed: ${TIGER_TEST_FOLDER}\n")


def test_what_an_environment_variable_holds_is_text_and_not_yaml(night, monkeypatch):
    monkeypatch.setenv("TIGER_TEST_FOLDER", "/data/run #3: {a")
    monkeypatch.setenv("TIGER_TEST_COUNT", "7")
    settings = night(
        "# ${NO_SUCH_VARIABLE_OF_OURS}\nmodel: {num_layers: '${TIGER_TEST_COUNT}'}\n",
        required="storage: {root: /r}\ncatalog: {uri: /c}\nevents:\n  uri: ${TIGER_TEST_FOLDER}/e\n",
    )
    assert settings.events.uri == "/data/run #3: {a/e"
    assert settings.model.num_layers == 7


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "training: {num_steps: 7}\ntraining: {use_gpu: true}\n",
            r"the key 'training' comes first(.|\n)*line 4(.|\n)*and again(.|\n)*line 5",
        ),
        (
            "training:\n  num_steps: 7\n  num_steps: 8\n",
            r"the key 'num_steps' comes first(.|\n)*line 5(.|\n)*and again(.|\n)*line 6",
        ),
    ],
)
def test_a_key_that_comes_twice_is_refused_with_both_lines(night, yaml, message):
    with pytest.raises(SettingsError, match=rf"night\.yaml is not YAML: {message}"):
        night(yaml)


def test_an_environment_variable_within_braces_needs_quotes_and_the_error_says_so(night):
    with pytest.raises(SettingsError, match=r"is not YAML(.|\n)*'\$\{NAME\}' needs its quotes"):
        night("model: {num_layers: ${TIGER_TEST_COUNT}}\n")


@pytest.mark.parametrize("word", ["--quantizer.level_sizes=[64,64", '--catalog.text=Sub "x'])
def test_a_list_that_does_not_end_is_refused(night, word):
    with pytest.raises(SettingsError, match=r"command line: .*write a list as"):
        night("", word)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "must hold sections like `storage:`, not a list"), ("a: [\n", "is not YAML")],
)
def test_a_file_that_is_no_settings_file_is_named(tmp_path, text, message):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=rf"settings file .*odd\.yaml {message}"):
        load_settings(["--config", str(file)])


def test_a_settings_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"cannot read settings file .*none\.yaml: No such file"):
        load_settings(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(SettingsError, match="--config needs the name of a YAML file"):
        load_settings(["--config"])


GOES_AFTER = {"sasrec.yaml": "amazon.yaml", "sports.yaml": "amazon.yaml"}
"""Files that change some settings of another one."""


@pytest.mark.parametrize("file", sorted(REPO.glob("jobs/*.yaml")), ids=lambda file: file.name)
def test_every_yaml_file_of_the_repo_loads(file, monkeypatch):
    monkeypatch.setenv("TIGER_DATA", "/data")
    files = [file.with_name(name) for name in (GOES_AFTER.get(file.name), file.name) if name]
    words = [word for each in files for word in ("--config", str(each))]
    settings = load_settings([*words, "--date", "2026-11-23"])
    assert settings.date == "2026-11-23"
    assert settings.storage.root


def test_the_set_of_settings_grows_by_decision_only():
    """A new or removed setting changes `setting_names.txt` in the same commit."""
    assert sorted(setting_names()) == NAMES_FILE.read_text().split()


def test_no_setting_holds_a_credential():
    words = re.compile(r"secret|password|passwd|credential|api_?key|access_?key|auth", re.IGNORECASE)
    assert [name for name in setting_names() if words.search(name)] == []
    # `tokens` are what the model reads; a token that opens a door would be singular
    assert [name for name in setting_names() if re.search(r"(^|[._])token($|[._])", name)] == []


OPERATIONAL = {
    "storage": {"replace", "commit_deadline_s"},
    "ray": {"address", "num_cpus", "progress"},
    "embeddings": {"batch_size", "num_workers", "cpus_per_worker", "use_gpu"},
    "quantizer": {"num_workers", "use_gpu", "cpus_per_worker", "memory_mb_per_worker", "max_failures"},
    "semantic_ids": {"min_usage", "min_perplexity", "max_disambiguated_share"},
    "training": {"num_workers", "cpus_per_worker", "use_gpu", "max_failures", "log_every_steps"},
    "decoding": {"num_workers", "cpus_per_worker", "use_gpu"},
    "evaluation": {"min_ratio_to_popularity", "max_drop"},
    "export": None,
    "serving": None,
}


def test_operational_settings_are_no_part_of_a_fingerprint(night):
    settings = night()
    for section, fields_of in ((name, getattr(settings, name)) for name in type(settings).model_fields):
        if isinstance(fields_of, Section):
            wanted = OPERATIONAL.get(section, set())
            hidden = set(type(fields_of).model_fields) - set(fields_of.fingerprint())
            assert hidden == (set(type(fields_of).model_fields) if wanted is None else wanted), section


def test_a_fingerprint_changes_with_what_is_computed_and_not_with_how(night):
    before = night().training.fingerprint()
    how = night("", "--training.num_workers", "2", "--training.max_failures", "9").training.fingerprint()
    what = night("", "--training.num_steps", "3").training.fingerprint()
    assert before == how != what


def test_the_resolved_settings_give_the_same_settings_again(night):
    settings = night("evaluation: {ks: [3]}\n", "--seed", "5")
    assert Settings(**settings.resolved()) == settings


@pytest.mark.parametrize("temperature", [1e-39, 0.0, 1e9, float("nan")])
def test_a_temperature_that_would_leave_no_numbers_is_refused(temperature):
    with pytest.raises(ValidationError, match="temperature"):
        DecodingSettings(temperature=temperature)


@pytest.mark.parametrize(
    ("name", "required"),
    [
        ("evaluation.ks", REQUIRED + "evaluation: {ks: []}\n"),
        ("catalog.text", REQUIRED.replace("uri: /c", "uri: /c, text: []")),
        ("seed", REQUIRED + "seed: -1\n"),
    ],
)
def test_a_value_that_would_only_stop_a_later_stage_is_refused(night, name, required):
    with pytest.raises(SettingsError, match=rf"(^|\s){re.escape(name)}\b"):
        night(required=required)
