"""python -m octad.cli: the command line, for processes that cannot rely on the `octad` script being on the PATH."""

from octad.cli.main import main

main()
