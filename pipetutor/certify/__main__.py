"""``python -m pipetutor.certify``: the certificate."""

from pipetutor.certify.certificate import main

main()
