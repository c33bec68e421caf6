"""What octad does, as functions of Python: the command line calls the same ones."""
