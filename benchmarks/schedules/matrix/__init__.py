"""Every pipeline schedule against one device: generated cases, run on real ranks, compared tensor by tensor."""
