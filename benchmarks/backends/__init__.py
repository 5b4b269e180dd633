"""What it costs to exchange through gloo, through MPI with each of its algorithms, and through shared memory."""
