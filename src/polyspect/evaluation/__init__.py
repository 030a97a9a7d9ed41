"""Evaluation of a model on labelled parts, the results folder, and verdicts on new parts."""
