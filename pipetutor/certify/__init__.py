"""Does the pipeline compute what one process computes? The certificate, and the proof behind it."""

from pipetutor.certify.certificate import Certificate, certify

__all__ = ["Certificate", "certify"]
