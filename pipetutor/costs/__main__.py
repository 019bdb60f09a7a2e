"""``python -m pipetutor.costs``: what each layer costs here."""

from pipetutor.costs.measuring import main

main()
