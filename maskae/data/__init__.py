"""Where records come from, what is done to them on the host and on the device, and the order they come in."""
