"""An example app: what a SuperLink and its SuperNodes run."""
