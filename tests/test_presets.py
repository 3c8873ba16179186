"""A model's presets: a property stands for the defaults of others, and what is given wins."""

from __future__ import annotations

from recbole_cl.config import CLConfig


def test_a_preset_sets_defaults_and_gives_way() -> None:
    """Its values stand above the model's own defaults and below what was given; the neutral word changes nothing."""
    plain = CLConfig(model="ProtoFedSP", dataset="ml-100k")
    assert (plain["protofed_aggregator"], plain["protofed_long_rate"]) == ("DPFedKMeans", 1.0)
    asked = {"protofed_preset": "paper_literal", "protofed_long_rate": 0.5}
    literal = CLConfig(model="ProtoFedSP", dataset="ml-100k", config_dict=asked)
    assert (literal["protofed_aggregator"], literal["protofed_long_rate"]) == ("AsPrinted", 0.5)
    assert literal["protofed_short_rate"] == 5e-3 and literal["protofed_epsilon"] is None
    assert literal.component_parameters("protofed_aggregator")["sigma"] == 0.4
