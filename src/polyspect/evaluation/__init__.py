"""Evaluation of a model on labelled parts, and the results folder that it leaves behind."""
