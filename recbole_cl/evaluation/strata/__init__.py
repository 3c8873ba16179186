"""Strata of the evaluated rows, beside those of warm and new users and items: one class each.

A stratum is a class that derives from :class:`~recbole_cl.evaluation.strata.base.Stratum`, decorated with
``@strata.register("its_name")``, here or in another package (entry-point group ``recbole_cl.strata``). The property
``strata`` chooses: ``strata: [history_length]``, or ``strata: {history_length: {thresholds: [10]}}``.
"""

from recbole_cl.evaluation.strata.base import Stratum, flags_of

__all__ = ["Stratum", "flags_of"]
