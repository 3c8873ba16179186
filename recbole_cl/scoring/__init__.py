"""How one cell of the matrix is scored: a model on the targets of a stage.

- :mod:`~recbole_cl.scoring.known` what the model has trained on; the rest is a miss
- :mod:`~recbole_cl.scoring.rows` what is ranked: rows, positives, what is masked, sampled candidates
- :mod:`~recbole_cl.scoring.scores` what the model answers
- :mod:`~recbole_cl.scoring.metrics` RecBole's metrics of rankings and values, accuracy and F1 of classes
- :mod:`~recbole_cl.scoring.outcome` the result: metrics over all targets and by stratum

:class:`recbole_cl.evaluator.Evaluator` puts them together. What the cells say as a matrix is another matter, that of
:mod:`recbole_cl.evaluation`.
"""
