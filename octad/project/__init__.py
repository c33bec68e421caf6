"""A directory of one's own: `octad init` begins it, `octad make` goes the whole road in it."""
