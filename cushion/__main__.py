"""`python -m cushion` is the command `cushion`."""

from cushion.start import main

main()
