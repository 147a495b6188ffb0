"""The `composer` section: unknown keys, contradictions, and what the messages say."""

import pytest

from composer_plugins.config import check_sampled_level, parse_section, read_yaml
from composer_plugins.errors import ConfigError


def test_defaults_are_composer_2_as_published():
    config = parse_section(None)
    assert (config.policy.objective, config.policy.weight) == ("dr_grpo", 1.0)
    assert (config.sdpo.weight, config.replay_dpo.weight) == (0.0, 0.0)
    assert (config.sdpo.alpha, config.sdpo.teacher.kind, config.sdpo.scope) == (1.0, "ema", "error_turn")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sdpo": {"weigth": 1}}, r"Unknown key `composer\.sdpo\.weigth`"),
        ({"sdop": {}}, r"Unknown key `composer\.sdop`"),
        ({"sdpo": {"alpha": 2}}, r"`composer\.sdpo\.alpha`.*found 2"),
        ({"policy": {"kl": {"coef": 0.1, "placement": "loss"}}}, "expected gradient of zero"),
        ({"policy": {"kl": {"coef": 0.1, "estimator": "k3"}}}, "placement: reward takes estimator: k1"),
        ({"replay_dpo": {"weight": 1}}, r"replay_dpo\.pairs names no file"),
        ({"policy": {"weight": 0}}, "all weights are 0"),
        ({"sdpo": {"level": "sampled", "alpha": 0.5}}, r"level `sampled`.*alpha: 0\.5"),
        ({"sdpo": {"level": "sampled", "entry_clip": 0.1}}, "entry_clip"),
        ({"sdpo": {"level": "sampled", "teacher": {"kind": "trust_region"}}}, "trust_region"),
    ],
)
def test_a_bad_section_is_refused_with_the_reason(section, message):
    with pytest.raises(ConfigError, match=message):
        parse_section(section)


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="Unknown key"):
        parse_section({"nope": 1})


def test_several_problems_are_listed_together():
    with pytest.raises(ConfigError) as error:
        parse_section({"sdpo": {"alpha": 2}, "policy": {"clipp": 1}})
    assert len(str(error.value).splitlines()) == 2


def test_the_sampled_level_accepts_reverse_kl():
    check_sampled_level(parse_section({"sdpo": {"weight": 1}}).sdpo)


@pytest.mark.parametrize(("content", "message"), [("", "mapping"), ("- a\n", "mapping"), ("a: [", "not valid YAML")])
def test_a_bad_yaml_file_is_refused(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_a_missing_yaml_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_the_reference_page_is_generated_from_the_schema():
    from pathlib import Path

    from composer_plugins.config_reference import markdown

    page = Path(__file__).parents[1] / "docs/reference/config.md"
    assert page.read_text() == markdown(), "run: python -m composer_plugins.config_reference > docs/reference/config.md"
