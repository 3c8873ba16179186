"""The commands of ``recbole-cl``, one file each. ``recbole_cl.registry.commands`` finds them by name.

:mod:`~recbole_cl.commands.base` says what a command is, :mod:`~recbole_cl.commands.terminal` how it speaks.
"""
