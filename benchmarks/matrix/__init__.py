"""Ways of dividing data, times everything else that a layout divides, times what a step is used with; each case is
compared with plain torch on one device, tensor by tensor."""
