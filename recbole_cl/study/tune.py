"""Properties are chosen on the first stages of a stream, on their validation targets alone, by optuna (extra ``tune``).

A method that is tuned on the whole stream knows the future: its strength was chosen by stages that had not happened
when it had to be chosen. So a trial trains the first stages only, and after each of them scores the validation targets
of every stage so far. The trial's value is the mean over those trained stages of the mean over the stages so far, the
summary ``average_over_time`` of the validation sets: it counts both what is learnt and what is forgotten.
Test targets are never scored.

A search can be killed at any time. What is done stands in ``trials.json``; the sampler of trial n is seeded by n and
looks at the trials before it, so the search that goes on is the one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recbole.data.transform import construct_transform

from recbole_cl.config import CLConfig, properties_dir, read_properties
from recbole_cl.disk import explained, write_atomically
from recbole_cl.errors import ConfigError, RecBoleCLError, TrainingError, nearest
from recbole_cl.results.matrix import smaller_is_better
from recbole_cl.rng import derive
from recbole_cl.schema import is_integer, is_number
from recbole_cl.stream.build import build_stream
from recbole_cl.training.runner import Runner

LOGGER = logging.getLogger("recbole_cl")
TRIALS, BEST = "trials.json", "best.yaml"
KINDS = ("log", "uniform", "integer", "choice")


class FirstStages(Runner):
    """A run over the first stages of a stream that scores their validation targets and writes nothing.

    Args:
        config: The configuration.
        n: How many stages.
    """

    only_trains = True

    def __init__(self, config: Any, n: int) -> None:
        super().__init__(config)
        self.n = n
        self.scores: list[list[float]] = []

    def measured(self) -> float:
        """Trains and returns the value of the trial; larger is better whatever the metric.

        Raises:
            ConfigError: If the stream has too few stages, or no stage has validation targets.
        """
        construct_transform(self.config)
        stream = build_stream(self.config)
        if len(stream) <= self.n:
            raise ConfigError(
                f"--first_stages={self.n}: the stream has {len(stream)} stages, and the last ones are to stay unseen; "
                f"give at most {len(stream) - 1}"
            )
        self.begin(stream)
        for index in range(self.n):
            self._stage(index, None)
        means = [float(np.mean(row)) for row in self.scores if row]
        if not means:
            raise ConfigError(
                f"--first_stages={self.n}: none of them has validation targets; give a larger valid_split, or a "
                f"stage_split that holds some out"
            )
        return float(np.mean(means))

    def _evaluate_all(self, ctx: Any) -> None:
        row = []
        for stage in self.stream.stages[: ctx.index + 1]:
            if len(stage.valid):
                metric = self.journal.primary(stage)
                value = self.evaluator.evaluate(ctx, self.known, stage, "valid").metrics.get(metric)
                if value is not None and math.isfinite(value):
                    row.append(float(value) if self.journal.bigger(stage) else -float(value))
        self.scores.append(row)


# -- what is searched ---------------------------------------------------------------------------------------------


def read_space(asked: str | None, strategies: list[str]) -> dict[str, dict[str, Any]]:
    """Returns what is searched: property to ``{kind: what}``.

    Args:
        asked: A YAML file, or YAML; ``None`` for those that come with the strategies (``properties/tune/``).
        strategies: Names of the strategies.

    Raises:
        ConfigError: If there is none, or an entry makes no sense.
    """
    folder = properties_dir() / "tune"
    if asked is None:
        found: dict[str, Any] = {}
        for name in strategies:
            if (folder / f"{name}.yaml").is_file():
                found |= read_properties(folder / f"{name}.yaml")
        if not found:
            known = sorted(file.stem for file in folder.glob("*.yaml"))
            raise ConfigError(
                f"--space: nothing is known to search for {', '.join(strategies)} (there is for {', '.join(known)}); "
                f'give a file, or YAML such as "learning_rate: {{log: [0.0001, 0.01]}}"'
            )
    elif asked.endswith((".yaml", ".yml")):
        found = read_properties(asked)
    else:
        try:
            found = yaml.safe_load(asked)
        except yaml.YAMLError as error:
            raise ConfigError(f"--space={asked}: it is no YAML ({error})") from error
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"--space={asked}: give {{property: {{log: [low, high]}}}}, or a file with that")
    return {str(name): _checked(str(name), entry) for name, entry in found.items()}


def _checked(name: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"--space: {name} is {entry!r}; give {{log: [0.1, 100]}}, or one of {', '.join(KINDS)}")
    kind, what = next(iter(entry.items()))
    if kind not in KINDS:
        hint = nearest(str(kind), KINDS) or "."
        raise ConfigError(f"--space: {name} is searched by {kind!r}, which is none{hint} Use {', '.join(KINDS)}")
    if not isinstance(what, list) or not what:
        raise ConfigError(f"--space: {name}: {kind} is {what!r}; give a list")
    if kind != "choice":
        fits = is_integer if kind == "integer" else is_number
        if len(what) != 2 or not all(map(fits, what)) or not what[0] < what[1] or (kind == "log" and what[0] <= 0):
            above = ", both above 0" if kind == "log" else ""
            raise ConfigError(f"--space: {name}: {kind} is {what!r}; give the lowest and the highest value{above}")
    return {kind: what}


def distributions(space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns optuna's distributions of a space."""
    from optuna import distributions as theirs

    found: dict[str, Any] = {}
    for name, entry in space.items():
        kind, what = next(iter(entry.items()))
        if kind == "choice":  # by its place: optuna keeps numbers, text and None only
            found[name] = theirs.CategoricalDistribution(list(range(len(what))))
        elif kind == "integer":
            found[name] = theirs.IntDistribution(*what)
        else:
            found[name] = theirs.FloatDistribution(float(what[0]), float(what[1]), log=kind == "log")
    return found


def meant(space: Mapping[str, Mapping[str, Any]], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the properties that optuna's draws mean."""
    return {name: space[name]["choice"][value] if "choice" in space[name] else value for name, value in drawn.items()}


# -- the search ---------------------------------------------------------------------------------------------------


def tune(
    configure: Any,
    space: Mapping[str, Mapping[str, Any]],
    folder: Path,
    n_trials: int,
    first_stages: int,
) -> dict[str, Any]:
    """Searches, or goes on searching.

    Args:
        configure: Returns the configuration with some properties changed: ``configure({"ewc_lambda": 3.0})``.
        space: What is searched, from :func:`read_space`.
        folder: Where ``trials.json`` and ``best.yaml`` are kept.
        n_trials: Trials in all, those done before included. The first one has the properties as they are.
        first_stages: How many stages are trained.

    Returns:
        ``best`` (the trial with the largest value), ``trials``, ``metric``.

    Raises:
        ConfigError: If optuna is not installed, or the folder holds a search of something else.
        TrainingError: If no trial came to a value.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("recbole-cl tune needs optuna; pip install 'recbole-cl[tune]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    base = configure({})
    trials = _trials(folder, _digest(base, space, first_stages))
    known = distributions(space)
    study = optuna.create_study(direction="maximize")
    for trial in trials[1:]:
        study.add_trial(_told(trial, known))
    while len(trials) < n_trials:
        number = len(trials)
        drawn: dict[str, Any] = {}
        if number:
            study.sampler = optuna.samplers.TPESampler(
                seed=derive(base["seed"], number, "tune") % 2**32, n_startup_trials=max(4, 2 * len(space))
            )
            drawn = dict(study.ask(known).params)
        trial = {
            "drawn": drawn,
            "properties": meant(space, drawn),
            **_value(configure, meant(space, drawn), first_stages),
        }
        trials.append(trial)
        if number:
            # asked trials stay open in optuna: the study is made anew of what is told, as after an interruption
            study = optuna.create_study(direction="maximize")
            for other in trials[1:]:
                study.add_trial(_told(other, known))
        _keep(folder, _digest(base, space, first_stages), trials)
        shown = "failed" if trial["value"] is None else f"{trial['value']:.4f}"
        LOGGER.info("trial %d/%d: %s %s", number + 1, n_trials, shown, trial["properties"] or "as given")
    done = [trial for trial in trials if trial["value"] is not None]
    if not done:
        raise TrainingError(f"no trial came to a value: {trials[0]['error']}")
    best = max(done, key=lambda trial: trial["value"])
    with explained(folder):
        write_atomically(folder / BEST, yaml.safe_dump(best["properties"], sort_keys=False))
    return {"best": best, "trials": trials, "metric": str(base["valid_metric"])}


def _value(configure: Any, changed: Mapping[str, Any], first_stages: int) -> dict[str, Any]:
    try:
        return {"value": FirstStages(configure(changed), first_stages).measured(), "error": None}
    except ConfigError:
        raise
    except RecBoleCLError as error:  # such as a loss that is not finite: an answer about these properties
        return {"value": None, "error": str(error)}


def _told(trial: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    failed = trial["value"] is None
    state = TrialState.FAIL if failed else TrialState.COMPLETE
    return create_trial(
        state=state, params=dict(trial["drawn"]), distributions=dict(known), value=None if failed else trial["value"]
    )


def _digest(base: CLConfig, space: Mapping[str, Any], first_stages: int) -> str:
    from recbole_cl.results.journal import settings

    fixed = {key: value for key, value in settings(base).items() if key not in ("output_dir", "state", "show_progress")}
    text = json.dumps([fixed, space, first_stages], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _trials(folder: Path, digest: str) -> list[dict[str, Any]]:
    file = folder / TRIALS
    if not file.is_file():
        return []
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["digest"] != digest:
        raise ConfigError(
            f"{folder} holds a search with other properties, stages or space; give another --output_dir, or remove it"
        )
    return list(kept["trials"])


def _keep(folder: Path, digest: str, trials: list[dict[str, Any]]) -> None:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TRIALS, json.dumps({"digest": digest, "trials": trials}, indent=1))


def table(found: Mapping[str, Any]) -> str:
    """Returns the trials as Markdown, the best first."""
    smaller = smaller_is_better(found["metric"].lower())
    names = list(dict.fromkeys(name for trial in found["trials"] for name in trial["properties"]))
    lines = [f"| trial | {found['metric']} on validation | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    order = sorted(enumerate(found["trials"], 1), key=lambda p: (p[1]["value"] is None, -(p[1]["value"] or 0.0)))
    for number, trial in order:
        value = trial["value"]
        shown = "failed" if value is None else f"{-value if smaller else value:.4f}"
        cells = [_short(trial["properties"].get(name, "as given")) for name in names]
        lines.append(f"| {number} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
