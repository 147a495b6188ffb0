"""prime-rl as a host of the `composer-rl` command line. Importing this module imports no prime-rl."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.errors import ComposerError, ConfigError
from composer_prime_rl.recipe import names_our_algorithm, read_toml, section_problems


class PrimeRLHost:
    """See `composer_plugins.hosts.Host`. A recipe is a TOML file of prime-rl's `rl` launcher, complete or an overlay."""

    name = "prime_rl"
    levels = (SignalLevel.SAMPLED,)
    conformance = "composer_prime_rl.conformance"
    #: prime-rl refuses unknown keys, so a recipe names its host by being TOML.
    recipe_suffixes = (".toml",)

    def version(self) -> str | None:
        """Return the version of prime-rl, from its metadata or the source tree on the path; None without it."""
        return installed() or _tree_version()

    def validate(self, recipe: Path) -> list[str]:
        """Return what is wrong with a recipe: TOML, our section, and what prime-rl's own `RLConfig` says."""
        try:
            data = read_toml(recipe)
            found = section_problems(data)
        except ComposerError as error:
            return str(error).splitlines()
        if self.version() is None:
            return [
                *found,
                "prime-rl is not installed here, so only TOML syntax and the composer section were checked "
                "(docs/how-to/prime-rl.md).",
            ]
        return found or config_problems(["@", str(recipe)])[0]

    def train(self, recipe: Path, *, output_dir: Path | None = None, overrides: list[str] | None = None) -> Path:
        """Run prime-rl's own `rl` launcher on a recipe and return its output folder.

        Raises:
            ConfigError: the recipe, with its base and overrides, is wrong or incomplete; nothing was started.
            ComposerError: prime-rl is not installed, or ended with another exit code than 0.
        """
        arguments = command_line(recipe, overrides or [])
        if output_dir is not None:
            arguments += ["--output-dir", str(output_dir.absolute())]
        data = read_toml(recipe)
        if not overrides:  # else only the whole says whether the parts agree
            _refuse(recipe, section_problems(data))
        if _launcher(names_our_algorithm(data)) is None:
            raise ComposerError(
                "prime-rl's `rl` launcher is not in this environment. Install composer-plugins into prime-rl's "
                f"(docs/how-to/prime-rl.md) and run there: rl {_shown(arguments)}"
            )
        found, config = config_problems(arguments)
        if config is None and not found:
            raise ConfigError(
                f"{recipe} is an overlay: prime-rl's own keys (model, orchestrator) are missing. Put it on top of your "
                f"configuration with --set @=your_base.toml, or run: rl {_shown(arguments)}"
            )
        _refuse(recipe, found)
        runs = config.model_dump(mode="json")  # base, recipe and overrides, merged by prime-rl itself
        _refuse(recipe, section_problems(runs))
        launcher = _launcher(names_our_algorithm(runs))
        code = subprocess.run([*launcher, *arguments]).returncode
        if code != 0:
            raise ComposerError(f"prime-rl ended with exit code {code}; its own messages are above.")
        return Path(getattr(config, "run_dir", None) or config.output_dir)


def installed() -> str | None:
    """Return the version of an installed prime-rl, None when there is none (a bare source tree is not installed)."""
    try:
        return metadata.version("prime-rl")
    except metadata.PackageNotFoundError:
        return None


def config_problems(arguments: list[str]) -> tuple[list[str], Any]:
    """Parse arguments of `rl` with prime-rl's own classes: (problems, configuration).

    Keys that are missing are no problem: an overlay leaves them to its base. The configuration is then None.
    """
    from composer_prime_rl.algorithm import register

    with contextlib.suppress(ConfigError):  # too late in this process: a recipe that names ours will say so
        register()
    from prime_rl.configs.rl import RLConfig
    from prime_rl.utils.config import cli
    from pydantic import ValidationError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return [], cli(RLConfig, args=arguments)
    except (Exception, SystemExit) as error:  # whatever prime-rl, verifiers or pydantic-config raise
        cause = error.__cause__ or error
        if not isinstance(cause, ValidationError):
            return [f"prime-rl's own check: {line.strip()}" for line in str(error).splitlines() if line.strip()], None
        found = [item for item in cause.errors() if item["type"] != "missing"]
        return [f"prime-rl's own check: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in found], None


def command_line(recipe: Path, overrides: list[str]) -> list[str]:
    """Return prime-rl's arguments: `a.b=c` becomes `--a.b c`, and `@=base.toml` a file that comes before the recipe.

    Raises:
        ConfigError: an override without `=`.

    >>> command_line(Path("mine.toml"), ["@=base.toml", "trainer.optim.lr=1e-6"])
    ['@', 'base.toml', '@', 'mine.toml', '--trainer.optim.lr', '1e-6']
    """
    bases, flags = [], []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"Expected --set KEY=VALUE, e.g. --set trainer.optim.lr=1e-6; found {override!r}.")
        if key == "@":
            bases += ["@", value]
        else:
            flags += [f"--{key}", value]
    return [*bases, "@", str(recipe), *flags]


def _refuse(recipe: Path, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"{recipe}:\n" + "\n".join(problems))


def _launcher(with_our_algorithm: bool) -> list[str] | None:
    """The `rl` program beside this Python, else on the path; None when prime-rl is not installed."""
    if installed() is None:
        return None
    if with_our_algorithm:
        return [sys.executable, "-m", "composer_prime_rl.launcher", "rl"]
    beside = Path(sys.executable).with_name("rl")
    program = str(beside) if beside.is_file() else shutil.which("rl")
    return program and [program]


def _shown(arguments: list[str]) -> str:
    """The arguments as a user types them, with a place for the base where none was named."""
    base = [] if arguments.count("@") > 1 else ["@", "your_base.toml"]
    return shlex.join([*base, *arguments])


def _tree_version() -> str | None:
    """The version in the pyproject.toml of a source tree that is on the path."""
    spec = importlib.util.find_spec("prime_rl")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        project = Path(folder).parents[1] / "pyproject.toml"
        if project.is_file():
            with contextlib.suppress(tomllib.TOMLDecodeError, KeyError):
                found = tomllib.loads(project.read_text())["project"]
                if found["name"] == "prime-rl":
                    return found["version"]
    return None


HOST = PrimeRLHost()
