"""Organised point clouds: planes, heights, normals, hole filling, connected pieces. No torch."""
