"""`python -m octad`, and so `torchrun -m octad train ...`: the same as the command `octad`."""

from octad.cli.main import main

main()
