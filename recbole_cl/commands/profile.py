"""``recbole-cl profile``: what a language model writes about the users, without a training."""

from __future__ import annotations

import argparse
from typing import Any

from recbole_cl.commands.base import ConfiguredCommand
from recbole_cl.commands.terminal import show
from recbole_cl.errors import ConfigError, printable
from recbole_cl.registry import commands

DAMAGED = 4
"""Exit code of a check that finds something damaged."""


@commands.register("profile")
class Profile(ConfiguredCommand):
    """Prepares LIBER's knowledge, or tells what is known, what would be sent, what it would cost."""

    summary = "let a language model write about the users of a dataset, for LIBER; show and forget it"
    description = (
        "profile DATASET asks for what is missing (it may be killed and run again); profile show USER and profile "
        "forget USER, with --dataset, tell and remove what was written. Any property of LIBER is set with --name=value."
    )
    place = 4
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("what", nargs="*", help="DATASET, or: show USER, forget USER")
        parser.add_argument("--dry-run", action="store_true", help="tell calls, tokens and cost; ask nobody")
        parser.add_argument("--show-prompt", metavar="USER", help="print what would be sent about a user; ask nobody")
        parser.add_argument("--batch-out", metavar="FILE", help="write what is open as a batch file (JSON lines)")
        parser.add_argument("--batch-in", metavar="FILE", help="read the answers of a batch into the cache")
        parser.add_argument("--check", action="store_true", help="tell what is missing, left over or damaged")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        # argparse takes a property whose value holds a blank for a word.
        properties = [*properties, *(word for word in options.what if word.startswith("--"))]
        options.what = [word for word in options.what if not word.startswith("--")]
        action, user = None, options.show_prompt
        if options.what and options.what[0] in ("show", "forget"):
            if len(options.what) != 2:
                raise ConfigError(f"profile {options.what[0]} needs a user: recbole-cl profile {options.what[0]} USER")
            action, user = options.what
        elif len(options.what) > 1:
            raise ConfigError(f"profile takes one dataset, or show USER, or forget USER; it was given {options.what}")
        elif options.what:
            options.dataset = options.what[0]
        options.model = options.model or "LIBER"
        config = self.configured(options, properties)
        from recbole_cl.model.liber_check import FAULTS
        from recbole_cl.model.liber_profile import Profiles

        profiles = Profiles(config)
        if action == "forget":
            count = profiles.forget(user)
            show(f"{count} texts about user {printable(user)} are removed; checkpoints of runs keep their vectors")
        elif action == "show":
            show("\n".join(printable(line) for line in profiles.show(user)))
        elif options.show_prompt:
            show("\n\n".join(profiles.prompts(user)))
        else:
            numbers = self._told(profiles, options)
            words = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in numbers.items()}
            show("\n".join(f"{name}: {value}" for name, value in words.items()))
            if options.check and any(numbers[name] for name in FAULTS):
                raise SystemExit(DAMAGED)

    @staticmethod
    def _told(profiles: Any, options: argparse.Namespace) -> dict[str, Any]:
        """Does what was asked for of a dataset, and returns the figures."""
        asked = [bool(options.dry_run), bool(options.batch_out), bool(options.batch_in), bool(options.check)]
        if sum(asked) > 1:
            raise ConfigError("profile: give one of --dry-run, --batch-out, --batch-in and --check")
        if options.batch_out:
            return profiles.batch_out(options.batch_out)  # type: ignore[no-any-return]
        if options.batch_in:
            return profiles.batch_in(options.batch_in)  # type: ignore[no-any-return]
        if options.check:
            return profiles.check()  # type: ignore[no-any-return]
        return profiles.estimate() if options.dry_run else profiles.prepare()  # type: ignore[no-any-return]
