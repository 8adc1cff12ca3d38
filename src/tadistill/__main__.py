"""`python -m tadistill` is the command line."""

from tadistill.cli import main

main()
