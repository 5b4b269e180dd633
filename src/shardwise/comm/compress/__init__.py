"""Collectives and transports that send fewer bytes than they are given: wrappers, one way of doing it a file."""
