"""What a component in another package is tested with: a planted-drift stream and the contract of a strategy.

Needs pytest (``pip install recbole-cl[test]``). Nothing of the package itself imports from here.
"""

from recbole_cl.testing.toy import PlantedDrift, write_planted_drift

__all__ = ["PlantedDrift", "write_planted_drift"]
