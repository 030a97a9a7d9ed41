"""Frozen feature extractors: timm image backbones and the way modalities become their input."""
