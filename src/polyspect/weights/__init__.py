"""Where pretrained weights come from: known files and hashes, places to look, downloads, converters.

`resolve` finds and verifies a file, `convert` reads it, `catalogue` lists, checks and fetches for the command line.
"""
