"""How a model is trained: the walk over the stream, its stages, their passes, their steps.

- :mod:`~recbole_cl.training.runner` the walk: train a stage, evaluate, write a checkpoint, go on
- :mod:`~recbole_cl.training.stage_models` the models of a stage: new, of the stage before, over another graph
- :mod:`~recbole_cl.training.passes` one pass: its epochs, validation, the best snapshot
- :mod:`~recbole_cl.training.trainer` one epoch: RecBole's trainer with the hooks of the strategies
- :mod:`~recbole_cl.training.data_parallel` one pass of several processes, each with its share of a batch
- :mod:`~recbole_cl.training.resume` what a checkpoint says about a run, and whether a run may go on from it
"""
