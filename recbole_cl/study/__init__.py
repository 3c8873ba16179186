"""A study: a table of methods x models x logs x schedulers x seeds as one resumable command.

- :mod:`~recbole_cl.study.plan` what is compared: a YAML file with presets becomes a list of cells
- :mod:`~recbole_cl.study.walk` runs the cells that are not done yet, some at a time
- :mod:`~recbole_cl.study.table` means and intervals over seeds, as Markdown and CSV
- :mod:`~recbole_cl.study.compare` tests against a reference, as Markdown, LaTeX and CSV, with the arithmetic of
  :mod:`~recbole_cl.study.statistics` and the figures of :mod:`~recbole_cl.study.pictures`
- :mod:`~recbole_cl.study.found` finished runs of any origin as a study
- :mod:`~recbole_cl.study.plots` learning curves and other figures beside the tables
- :mod:`~recbole_cl.study.orders` orders of tasks as an axis, and what they cost
- :mod:`~recbole_cl.study.probes` what is measured of a finished model; :mod:`~recbole_cl.study.universal` is one
"""

from recbole_cl.study.found import found_plan
from recbole_cl.study.plan import Cell, Plan, list_studies, read_plan
from recbole_cl.study.table import comparison, write_tables
from recbole_cl.study.walk import walk

__all__ = ["Cell", "Plan", "comparison", "found_plan", "list_studies", "read_plan", "walk", "write_tables"]
