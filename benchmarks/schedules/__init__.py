"""Every schedule by the clock: beside torch's, beside its own simulation, beside what two processes can do at most."""
