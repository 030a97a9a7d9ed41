"""Fitting: the engine that runs a detector's stages, its feature cache, checkpoints and model files."""
