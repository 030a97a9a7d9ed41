"""polyspect: find defects on manufactured parts from registered RGB, 3D and normal views, learning from good parts only."""

__version__ = "0.1.0"
