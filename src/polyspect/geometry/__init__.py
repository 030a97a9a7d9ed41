"""Point clouds.

Organised, in numpy and without torch: planes, heights, normals, hole filling, connected pieces. Packed into (B, N, 3),
in torch: farthest points, neighbours, interpolation and pooling, FPFH. Depth images, in torch: descriptors.
"""
