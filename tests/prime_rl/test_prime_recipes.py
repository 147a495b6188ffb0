"""The recipes under recipes/prime_rl: TOML and our sections everywhere; prime-rl's own classes where it is."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")

from composer_prime_rl.host import HOST, command_line
from composer_prime_rl.recipe import section_problems
from composer_prime_rl.section import loss_options
from typer.testing import CliRunner

from composer_plugins.cli import build_app
from composer_plugins.cli.validate import examine
from composer_plugins.errors import ComposerError, ConfigError

RECIPES = Path(__file__).parents[2] / "recipes" / "prime_rl"
FILES = sorted(RECIPES.glob("*.toml"))
ARMS = [RECIPES / f"composer_{arm}.toml" for arm in ("policy", "sdpo", "replay_dpo", "all")]
HERE = HOST.version() is not None


def tables(path):
    return tomllib.loads(path.read_text())


def test_there_is_a_base_and_one_per_arm():
    assert {RECIPES / "composer_base.toml", *ARMS} <= set(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_our_sections_are_valid_and_the_file_names_its_command(path):
    data = tables(path)
    assert section_problems(data) == []
    assert path.name in path.read_text()
    if "loss" in data["trainer"]:
        assert loss_options(data["trainer"]["loss"].get("kwargs", {})).composer.policy.objective == "dr_grpo"


def test_the_arms_are_a_ladder():
    """policy < +sdpo, +replay_dpo < all, and `all` is nothing but the two together."""
    arms = {f.stem.removeprefix("composer_"): tables(f) for f in ARMS}

    def channels(data):
        names = {"policy"}
        if data["trainer"]["loss"]["kwargs"]["composer"].get("sdpo", {}).get("weight"):
            names.add("sdpo")
        for source in data.get("orchestrator", {}).get("train", {}).get("source", []):
            if source["env"].get("composer", {}).get("sdpo", {}).get("weight"):
                names.add("sdpo stamped")
            if source["env"]["taskset"].get("composer", {}).get("replay_dpo", {}).get("weight"):
                names.add("replay_dpo")
        return names

    assert channels(arms["policy"]) == {"policy"}
    assert channels(arms["sdpo"]) == {"policy", "sdpo", "sdpo stamped"}
    assert channels(arms["replay_dpo"]) == {"policy", "replay_dpo"}
    assert channels(arms["all"]) == {"policy", "sdpo", "sdpo stamped", "replay_dpo"}
    assert arms["all"]["trainer"] == arms["sdpo"]["trainer"]
    sources = [arms[arm]["orchestrator"]["train"]["source"] for arm in ("all", "sdpo", "replay_dpo")]
    assert sources[0] == [sources[1][0], sources[2][1]]


def test_every_text_names_whose_idea_a_channel_is():
    for path in ARMS:
        assert re.search(r"replicates? Cursor's published recipe", path.read_text()) or "replay" in path.stem
        assert ("replay_dpo" not in path.read_text()) or "our own addition" in path.read_text()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('type = "custom"', 'type = "default"', "found type 'default'"),
        ("composer_loss", "composer_los", "found type 'custom'"),
        ('objective = "dr_grpo"', 'objective = "drgrpo"', "Unknown objective 'drgrpo'"),
        (
            'objective = "dr_grpo"',
            'objektive = "dr_grpo"',
            "Unknown key `trainer.loss.kwargs.composer.policy.objektive`",
        ),
        ('sdpo_route = "ref_kl"           #', 'sdpo_route = "loss" #', "would count twice"),
        ('sdpo_route = "ref_kl"           # the same', 'sdpo_route = "loss" # the same', "would count nowhere"),
        ("weight = 0.5                    #", "weight = 0.4 #", "source.0.env.composer.sdpo.weight is 0.4"),
        (
            'teacher.kind = "live"\n\n[orchestrator.train.source.env.taskset]',
            "\n[orchestrator.train.source.env.taskset]",
            "teacher.kind: ema",
        ),
        ('pairs = "pairs.jsonl"\n', "\n", "replay_dpo.pairs names no file"),
        ("[trainer.loss]", "[trainer.loss", "is not valid TOML"),
    ],
)
def test_validate_says_what_is_wrong(tmp_path, old, new, says):
    text = (RECIPES / "composer_all.toml").read_text()
    if "route" in old and "the same" not in old:
        where = text.index(old)  # the loss's, which comes first
        text = text[:where] + new + text[where + len(old) :]
    else:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    finding = examine(path)
    assert any(says in problem for problem in finding.problems), finding.problems
    result = CliRunner().invoke(build_app(), ["validate", str(path)])
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize(
    "text",
    [
        "",
        "trainer = 3",
        "[trainer]\nloss = 3",
        "[orchestrator.train]\nsource = 3",
        "[trainer.loss.kwargs]\ncomposer = 3",
        "\x00",
    ],
)
def test_odd_files_are_findings_not_tracebacks(tmp_path, text):
    path = tmp_path / "odd.toml"
    path.write_text(text)
    assert examine(path).problems
    path.write_bytes(b"\xff\xfe")
    assert examine(path).problems


def test_a_missing_prime_rl_is_no_pass(monkeypatch):
    monkeypatch.setattr(type(HOST), "version", lambda self: None)
    finding = examine(RECIPES / "composer_policy.toml")
    assert finding.problems == [
        "prime-rl is not installed here, so only TOML syntax and the composer section were checked "
        "(docs/how-to/prime-rl.md)."
    ]


def test_train_without_prime_rl_says_what_to_run(monkeypatch):
    import composer_prime_rl.host as module

    monkeypatch.setattr(module, "installed", lambda: None)
    recipe = RECIPES / "composer_sdpo.toml"
    with pytest.raises(ComposerError, match=r"rl @ your_base.toml @ \S+composer_sdpo.toml --trainer.optim.lr 1e-6"):
        HOST.train(recipe, overrides=["trainer.optim.lr=1e-6"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        HOST.train(recipe, overrides=["trainer.optim.lr"])


def test_train_refuses_a_wrong_recipe_before_anything_else(tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(
        '[trainer.loss]\ntype = "custom"\nimport_path = "composer_prime_rl.loss.composer_loss"\nkwargs = {a = 1}\n'
    )
    with pytest.raises(ConfigError, match=r"Unknown key `trainer.loss.kwargs.a`"):
        HOST.train(wrong)
    with pytest.raises(ConfigError, match="no such file"):
        HOST.train(tmp_path / "none.toml")


def test_overrides_become_prime_rls_arguments():
    got = command_line(Path("r.toml"), ["a.b=c=d", "@=base.toml", "x=1"])
    assert got == ["@", "base.toml", "@", "r.toml", "--a.b", "c=d", "--x", "1"]


# prime-rl's own classes


@pytest.mark.prime_rl
class TestWithPrimeRL:
    @pytest.fixture(autouse=True)
    def new_enough(self, prime_tree):
        types = prime_tree / "packages" / "prime-rl-configs" / "src" / "prime_rl" / "configs" / "orchestrator.py"
        if not types.is_file() or "class TrainSourceConfig" not in types.read_text():
            pytest.skip("the recipes are for 0.8.1.dev53 and later: earlier versions name sources otherwise")

    def parsed(self, *arguments):
        from composer_prime_rl.host import config_problems

        problems, config = config_problems(list(arguments))
        assert problems == [], problems
        return config

    @pytest.mark.parametrize("arm", ARMS, ids=lambda p: p.stem)
    def test_each_arm_on_the_base(self, arm):
        config = self.parsed("@", str(RECIPES / "composer_base.toml"), "@", str(arm))
        assert config.trainer.loss.import_path == "composer_prime_rl.loss.composer_loss"
        kinds = [type(source.env).__name__ for source in config.orchestrator.train.source]
        assert (
            kinds
            == {
                "composer_policy": ["HarborEnvConfig"],
                "composer_sdpo": ["ComposerEnvConfig"],
                "composer_replay_dpo": ["HarborEnvConfig", "ComposerEnvConfig"],
                "composer_all": ["ComposerEnvConfig", "ComposerEnvConfig"],
            }[arm.stem]
        )

    def test_the_base_alone_is_complete(self):
        assert self.parsed("@", str(RECIPES / "composer_base.toml")) is not None

    @pytest.mark.parametrize("arm", ARMS, ids=lambda p: p.stem)
    def test_an_overlay_alone_is_valid(self, arm):
        assert examine(arm).problems == []

    def test_an_overlay_without_its_base_is_not_run(self, monkeypatch, tmp_path):
        """Keys that are missing are the base's business for `validate`, and an error for `train`."""
        import composer_prime_rl.host as module

        monkeypatch.setattr(module, "_launcher", lambda ours: [sys.executable, "-c", "print('must not run')"])
        assert self.parsed("@", str(RECIPES / "composer_policy.toml")) is None
        with pytest.raises(ConfigError, match=r"--set @=your_base\.toml"):
            HOST.train(RECIPES / "composer_policy.toml")

    def test_train_runs_the_launcher_with_the_base_first(self, monkeypatch, tmp_path):
        import composer_prime_rl.host as module

        log = tmp_path / "argv.txt"
        code = f"import sys; open({str(log)!r}, 'w').write(chr(10).join(sys.argv[1:]))"
        monkeypatch.setattr(module, "_launcher", lambda ours: [sys.executable, "-c", code])
        base, arm = RECIPES / "composer_base.toml", RECIPES / "composer_policy.toml"
        folder = HOST.train(arm, output_dir=tmp_path / "out", overrides=[f"@={base}", "max_steps=3"])
        assert log.read_text().splitlines() == [
            "@", str(base), "@", str(arm), "--max_steps", "3", "--output-dir", str(tmp_path / "out"),
        ]  # fmt: skip
        assert folder.is_relative_to(tmp_path / "out")
        monkeypatch.setattr(module, "_launcher", lambda ours: [sys.executable, "-c", "raise SystemExit(3)"])
        with pytest.raises(ComposerError, match="exit code 3"):
            HOST.train(arm, overrides=[f"@={base}"])

    def test_what_prime_rl_refuses_is_a_finding(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text((RECIPES / "composer_base.toml").read_text().replace("max_steps", "max_stebs"))
        assert any("max_stebs" in problem for problem in examine(path).problems)

    def test_arguments_of_the_command_line_reach_the_loss(self):
        base = ["@", str(RECIPES / "composer_base.toml"), "@", str(RECIPES / "composer_sdpo.toml")]
        flag = "--trainer.loss.kwargs.composer"
        config = self.parsed(
            *base, f"{flag}.policy.clip_low", "0.3", f"{flag}.sdpo.weight", "0.25", f"{flag}.policy.clip_high", "None"
        )
        kwargs = config.trainer.loss.kwargs
        assert kwargs["composer"]["policy"]["clip_low"] == "0.3"  # a string: prime-rl does not know our types
        section = loss_options(kwargs).composer
        assert (section.policy.clip_low, section.policy.clip_high, section.sdpo.weight) == (0.3, None, 0.25)

    def test_prime_rl_imports_the_loss_by_that_path(self, prime_loss):
        from composer_prime_rl.loss import composer_loss
        from prime_rl.utils.utils import import_object

        assert import_object("composer_prime_rl.loss.composer_loss") is composer_loss


@pytest.mark.skipif(HERE, reason="prime-rl is here")
def test_the_command_line_without_prime_rl():
    code = "from composer_plugins.cli import main; main()"
    command = [sys.executable, "-c", code, "validate", str(RECIPES / "composer_all.toml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "prime-rl is not installed here" in result.stdout
    assert "Traceback" not in result.stderr
