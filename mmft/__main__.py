"""`python -m mmft`."""

from mmft.cli import main

main()
