"""How one cell of the matrix is scored: a model on the targets of a stage.

- :mod:`~recbole_cl.evaluation.known` what the model has trained on; the rest is a miss
- :mod:`~recbole_cl.evaluation.rows` what is ranked: rows, positives, what is masked, sampled candidates
- :mod:`~recbole_cl.evaluation.scores` what the model answers
- :mod:`~recbole_cl.evaluation.ranking` lists of items: the way to the scores, what may stand in a list, the best k
- :mod:`~recbole_cl.evaluation.metrics` RecBole's metrics of rankings and values, accuracy and F1 of classes
- :mod:`~recbole_cl.evaluation.outcome` the result: metrics over all targets and by stratum

:class:`recbole_cl.evaluation.evaluator.Evaluator` puts them together. What the cells say as a matrix is another matter,
that of :mod:`recbole_cl.results`.
"""
