"""``python -m pipetutor.costs``: what each layer costs here."""

from pipetutor.costs.measure import main

main()
