"""Data sets: readers, preparation, the cache of prepared parts, and the synthetic generator. No torch until a batch."""
