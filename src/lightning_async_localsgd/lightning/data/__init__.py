"""Training data: samplers and loaders whose items are leased from the server, and the ends of epochs."""
