"""Who is compared: recipes that differ in [algorithm] only, or one recipe with several methods, or graphs."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from peertune.algorithms import METHODS
from peertune.compare.options import Options, split_outside_brackets
from peertune.config import RunConfig
from peertune.errors import ConfigError
from peertune.logfields import printable
from peertune.recipe import flatten, load_recipe

AXES = ("topology.", "data.partition.", "exchange.", "link.", "model.quantization", "run.batched_peers")
"""How the keys begin that a contestant may set for itself, beside those of [algorithm]. The last is here because not
all methods can have it; it changes time and memory only."""
LENGTHS = ("rounds", "outer_rounds", "inner_steps")
"""Keys of [algorithm] that say for how long a method trains."""
_UNSAFE = re.compile(r"[^\w.-]+")
MAX_SLUG = 100
"""Characters of a folder's name; file systems end at 255 bytes."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One column of the comparison."""

    name: str
    config: RunConfig
    """As the recipe has it; seed, budget and folder are set for each cell."""

    @property
    def slug(self) -> str:
        """The name as a folder's; a long one is cut, and told apart by a hash."""
        text = _UNSAFE.sub("-", self.name).strip("-.") or "unnamed"
        if len(text.encode()) <= MAX_SLUG:
            return text
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:12]
        return f"{text.encode()[: MAX_SLUG - 13].decode(errors='ignore')}-{digest}"

    def sets(self, key: str) -> bool:
        """Whether its name says itself what this key of [algorithm] is."""
        return f":{key}=" in self.name.replace(" ", "").replace(":algorithm.", ":")


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """Who is compared, and for how long."""

    contestants: list[Contestant]
    """In the order they were given."""
    pace: Contestant
    """Whose local steps, as its recipe says them, the first contestant makes: its own, or those of the recipe's own
    method, where the first is of another, and neither its name nor --set says how long it trains."""
    notes: list[str]
    """Remarks on the recipes."""


def read_contestants(options: Options) -> Lineup:
    """Load all recipes and check that they can be compared.

    Raises:
        ConfigError: a recipe, a method or a key cannot be used, there are fewer than two contestants, two have one
            name, or recipes differ in more than [algorithm].
    """
    if options.algorithms and len(options.recipes) > 1:
        raise ConfigError(
            f"--algorithms: got it with {len(options.recipes)} recipes, expected one recipe; leave it out to compare"
            " the recipes as they are"
        )
    contestants: list[Contestant] = []
    notes: list[str] = []
    if options.algorithms:
        unused: list[set[str]] = []
        for item in options.algorithms:
            own = _item_overrides(item)
            config, remarks = load_recipe(options.recipes[0], [*options.overrides, *own], METHODS)
            contestants.append(Contestant(name=item, config=config))
            by_key = {remark.partition(" ")[0]: remark for remark in remarks}
            unused.append(set(by_key))
            set_here = {override.partition("=")[0] for override in own}
            notes += [f"{item}: {remark}" for key, remark in by_key.items() if key in set_here]
        # What the recipe or --set says for all is meant for some; what none uses is a mistake.
        notes += [f"{key} is used by none of those compared" for key in sorted(set.intersection(*unused))]
        pace = _pace(options, contestants[0])
    else:
        for path in options.recipes:
            config, remarks = load_recipe(path, options.overrides, METHODS)
            name = printable(path.stem)
            contestants.append(Contestant(name=name, config=config))
            notes += [f"{name}: {remark}" for remark in remarks]
        _require_agreement(contestants)
        pace = contestants[0]
    if len(contestants) < 2:
        raise ConfigError(
            f"compare: got one contestant, {contestants[0].name!r}, expected two or more; name several recipes, or one"
            " with --algorithms a,b"
        )
    _require_distinct(contestants)
    if pace is not contestants[0]:
        notes.append(
            f"{contestants[0].name} trains for as many samples as the recipe's own method, {pace.name}, and so do all"
        )
    return Lineup(contestants=contestants, pace=pace, notes=notes)


def _pace(options: Options, first: Contestant) -> Contestant:
    """See `Lineup.pace`. A recipe's keys of length are its own method's, and mean nothing to another."""
    config, _ = load_recipe(options.recipes[0], options.overrides, METHODS)
    settings = [*split_outside_brackets(first.name, ":")[1:], *options.overrides]
    keys = {setting.partition("=")[0].strip().removeprefix("algorithm.") for setting in settings}
    says_itself = {key for key in keys & set(LENGTHS) if hasattr(first.config.algorithm, key)}
    if config.algorithm.name == first.config.algorithm.name or says_itself:
        return first
    return Contestant(name=config.algorithm.name, config=config)


def _item_overrides(item: str) -> list[str]:
    """`name:key=value` as overrides of a recipe; its keys are the method's own, or of one of the `AXES`."""
    name, *settings = split_outside_brackets(item, ":")
    overrides = [f"algorithm.name={json.dumps(name, ensure_ascii=False)}"]
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().removeprefix("algorithm.")
        if not equals or not value.strip():
            raise ConfigError(f"--algorithms {item!r}: got {setting!r}, expected key=value")
        if key.startswith(AXES):
            overrides.append(f"{key}={value.strip()}")
            continue
        if name in METHODS and key not in METHODS[name].model_fields:
            raise ConfigError(
                f"--algorithms {item!r}: {name} has no key {key!r}; it has {', '.join(METHODS[name].model_fields)};"
                f" others that may differ begin with {', '.join(AXES)}"
            )
        overrides.append(f"algorithm.{key}={value.strip()}")
    return overrides


def _require_distinct(contestants: list[Contestant]) -> None:
    seen: dict[str, str] = {}
    for contestant in contestants:
        # Some file systems do not tell upper from lower case.
        slug = contestant.slug.lower()
        if slug in seen:
            raise ConfigError(
                f"compare: {seen[slug]!r} and {contestant.name!r} would share the folder {contestant.slug!r}; rename a"
                " recipe, or name each method once"
            )
        seen[slug] = contestant.name


def _require_agreement(contestants: list[Contestant]) -> None:
    first = contestants[0]
    expected = flatten(first.config.to_dict())
    for other in contestants[1:]:
        got = flatten(other.config.to_dict())
        for key in sorted(expected.keys() | got.keys()):
            if key == "run.out" or key.startswith("algorithm.") or expected.get(key) == got.get(key):
                continue
            raise ConfigError(
                f"compare: {first.name} has {key} = {json.dumps(expected.get(key))}, {other.name} has"
                f" {json.dumps(got.get(key))}; they may differ in [algorithm] only: give all one value with --set"
            )
